"""What a trained model is good for: samples, evaluations, the judge, export, and the examples of tuning."""
