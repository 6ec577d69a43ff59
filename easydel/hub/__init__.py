"""Weights in and out: Hugging Face files and the Hub on one side, nnx modules on the other."""
