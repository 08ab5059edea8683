"""What happens next: the pure rules, the world that they see, and the hands that do what they say."""
