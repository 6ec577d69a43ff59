"""What a model can do besides a forward pass."""
