"""What the models learn from: a world of drawn scenes with captions that can be checked, or your own pictures."""
