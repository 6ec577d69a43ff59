"""The last resort: `pytorch_model.bin`, read by torch with `weights_only=True`, so that no code in it ever runs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import CheckpointError
from easydel.hub.safetensors import DTYPES, Index, TensorEntry, aligned_empty

VIEWS = {"bfloat16": ("BF16", "int16"), "float8_e4m3fn": ("F8_E4M3", "uint8"), "float8_e5m2": ("F8_E5M2", "uint8")}


@dataclass(frozen=True)
class PickledEntry(TensorEntry):
    """A tensor of a torch file; `tensor` is memory-mapped."""

    tensor: Any = None

    def read(self, index: Index | None = None) -> np.ndarray:
        """Return the tensor, or the block `index` of it, in memory of its own."""
        import torch

        tensor = self.tensor if index is None else self.tensor[index]
        view = VIEWS.get(str(tensor.dtype).removeprefix("torch."))
        raw = tensor.contiguous().view(getattr(torch, view[1])).numpy() if view else tensor.numpy()
        array = aligned_empty(tuple(tensor.shape), self.dtype)
        array[...] = raw.view(self.dtype) if view else raw
        return array


def read_pickled(file: Path) -> dict[str, TensorEntry]:
    """Return the table of the tensors in a torch file.

    Raises:
        CheckpointError: torch is not installed, or the file holds anything but a dictionary of tensors.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file}: this checkpoint has no safetensors, only a torch pickle, and torch is not installed; "
            "install torch or convert the checkpoint to safetensors"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: torch refuses to read it as plain weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, got {type(state).__name__}")
    table: dict[str, TensorEntry] = {}
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        dtype = DTYPES[VIEWS[kind][0]] if kind in VIEWS else np.dtype(kind)
        table[name] = PickledEntry(str(name), dtype, tuple(tensor.shape), file, 0, tensor.nbytes, None, tensor.detach())
    return table
