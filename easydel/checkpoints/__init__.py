"""Checkpoints of named arrays: asynchronous, atomic, readable onto any mesh."""

from easydel.checkpoints.arrays import load_arrays, save_arrays
from easydel.checkpoints.manager import Checkpoints, Restored
from easydel.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpoints", "Restored", "load_arrays", "save_arrays"]
