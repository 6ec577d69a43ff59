"""A module's weights as torch tensors, under the names and in the layout of the Hugging Face model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.quantized import float_variables
from easydel.hub.save import link_arrays
from easydel.hub.weight_map import build_links, tied_names

if TYPE_CHECKING:
    import torch

# dtypes numpy has no torch partner for, and the integers of the same width that carry their bits
BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def to_torch(module: nnx.Module) -> dict[str, torch.Tensor]:
    """Return name → CPU tensor, ready for `hf_model.load_state_dict(..., strict=True)`.

    Every tensor owns contiguous memory; tied names share one tensor, as in torch. Quantized weights are
    given as the floats their codes stand for.

    Raises:
        UnsupportedError: torch is not installed, or a dtype has no partner in torch.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "to_torch() is not supported without torch; install it (pip install torch) or use save_pretrained()"
        ) from error
    variables = float_variables(module)
    state: dict[str, torch.Tensor] = {}
    for link in build_links(module, variables, form="memory"):
        for name, array in zip(link.sources, link_arrays(link, variables), strict=True):
            state[name] = _tensor(np.array(array, order="C", copy=True), name)
    for alias, name in tied_names(module).items():
        if name in state:
            state[alias] = state[name]
    return state


def _tensor(array: np.ndarray, name: str) -> torch.Tensor:
    import torch

    kind = array.dtype.name
    if kind in BITS:
        return torch.from_numpy(array.view(BITS[kind])).view(getattr(torch, kind))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UnsupportedError(f"{name!r}: torch has no dtype for {kind} (not supported); cast it first") from error
