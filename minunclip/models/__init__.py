"""The networks of the paper, each in one module."""
