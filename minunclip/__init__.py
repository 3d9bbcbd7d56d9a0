"""DALL-E 2 (unCLIP) to train, take apart and understand: one section of the paper, one module."""
