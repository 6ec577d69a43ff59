"""The last resort: `pytorch_model.bin`, read by torch with `weights_only=True`, so that no code in it ever runs."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import CheckpointError
from easydel.hub.report import short
from easydel.hub.safetensors import DTYPES, Index, TensorEntry, aligned_empty

VIEWS = {"bfloat16": ("BF16", "int16"), "float8_e4m3fn": ("F8_E4M3", "uint8"), "float8_e5m2": ("F8_E5M2", "uint8")}
# what torch's unpickler and archive reader raise on damaged files, as seen by flipping bytes
REFUSALS = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class PickledEntry(TensorEntry):
    """A tensor of a torch file; `tensor` is memory-mapped."""

    tensor: Any = None

    def read(self, index: Index | None = None, *, exact: bool = False) -> np.ndarray:
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
        zipped = zipfile.is_zipfile(file)  # torch before 1.6 wrote a plain pickle, which cannot be mapped
        if zipped:
            _check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, *REFUSALS) as error:
        raise CheckpointError(
            f"{file}: torch refuses to read it as plain weights: {error!s:.1000}; no code in it was run. Convert the "
            "checkpoint to safetensors where you trust it"
        ) from error
    tensors = isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    if not tensors or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"{file}: expected a dictionary of tensors, got {type(state).__name__}; save a state_dict"
        )
    return {name: _entry(name, tensor, file) for name, tensor in state.items()}


def _check_archive(file: Path) -> None:
    """Raise if the archive would unpack to more than it is: torch stores, it never compresses."""
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise CheckpointError(f"{file}: is a compressed archive, which torch does not write; fetch it again")


def _entry(name: str, tensor: Any, file: Path) -> TensorEntry:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPES[VIEWS[kind][0]] if kind in VIEWS else next((d for d in DTYPES.values() if d.name == kind), None)
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if dtype is None or not plain:
        what = f"{kind}, {tensor.layout}, on {tensor.device}"
        raise CheckpointError(f"{file}: tensor {short(name)} is not supported ({what}); convert it to plain numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: tensor {short(name)} claims more bytes than it stores; save contiguous tensors")
    return PickledEntry(name, dtype, tuple(tensor.shape), file, 0, tensor.nbytes, None, tensor.detach())
