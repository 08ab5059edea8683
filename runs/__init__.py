"""What a run and a node are, what happened to them, and what it cost."""
