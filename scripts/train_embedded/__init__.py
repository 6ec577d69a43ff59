"""Builds the embedded model: `python -m scripts.train_embedded` (see README.md beside this file)."""
