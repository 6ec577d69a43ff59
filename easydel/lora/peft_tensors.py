"""The tensors of one layer's adapter in PEFT's layout, and in ours.

PEFT's `A` is `[rank, in]` and its `B` `[out, rank]`; of experts `[experts · rank, in]`, experts first, and
`[out, rank · experts]`, ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from easydel.errors import UnsupportedError
from easydel.lora.peft_names import PeftLayer

MAGNITUDE = "lora_magnitude_vector"
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

Arrays = Mapping[str, np.ndarray]
"""Of one of our layers: `a` `[…, in, rank]`, `b` `[…, rank, out]`, `scale` `[]` and, with DoRA, `magnitude` `[out]`."""


@dataclass(frozen=True)
class PeftTensors:
    """What PEFT keeps of one layer's adapter.

    Attributes:
        tensors: end of the name → array.
        rank: of it.
        scale: what its product is multiplied by.
    """

    tensors: dict[str, np.ndarray]
    rank: int
    scale: float


def tensor_shapes(layer: PeftLayer, rank: int, *, dora: bool) -> dict[str, tuple[int, ...]]:
    """Return end of the name → shape of the tensors of a layer's adapter."""
    outputs, rows = sum(layer.outputs), rank * (layer.experts or 1)
    a, b = EMBEDDING if layer.is_embedding else LINEAR
    return {a: (rows, layer.inputs), b: (outputs, rows)} | ({MAGNITUDE: (outputs,)} if dora else {})


def from_tensors(layer: PeftLayer, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return path → arrays, float32, of the layers that are one to PEFT; all have the same `a`."""
    names = EMBEDDING if layer.is_embedding else LINEAR
    a, b = (np.asarray(tensors[name], np.float32) for name in names)
    if layer.experts is None:
        a, b = a.T, b.T
    else:
        a = a.reshape(layer.experts, -1, layer.inputs).transpose(0, 2, 1)
        b = b.reshape(b.shape[0], -1, layer.experts).transpose(2, 1, 0)
    parts = [{"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(part)} for part in layer.split(b)]
    if MAGNITUDE in tensors:
        magnitudes = layer.split(np.asarray(tensors[MAGNITUDE], np.float32))
        parts = [part | {"magnitude": one} for part, one in zip(parts, magnitudes, strict=True)]
    return dict(zip(layer.paths, parts, strict=True))


def to_tensors(layer: PeftLayer, parts: Sequence[Arrays | None]) -> PeftTensors:
    """Return what PEFT keeps of an adapter.

    Layers that are one to PEFT and have one `A` keep their rank. If theirs differ, or some have none, the `A` stand
    one after another and the `B` on a diagonal of blocks: the same product, at the sum of their ranks.

    Args:
        layer: to PEFT.
        parts: arrays of each of our layers that make it up; `None`: it has no adapter.

    Raises:
        UnsupportedError: with DoRA, some of these layers have no adapter.
    """
    held = [part for part in parts if part is not None]
    scale = float(held[0]["scale"])
    dora = "magnitude" in held[0]
    if dora and len(held) < len(parts):
        missed = next(path for path, part in zip(layer.paths, parts, strict=True) if part is None)
        raise UnsupportedError(
            f"{', '.join(layer.paths)} are one layer ({layer.name}) to PEFT: writing an adapter with DoRA that leaves "
            f"out {missed} is not supported"
        )
    first = held[0]
    alike = all(np.array_equal(part["a"], first["a"]) and part["scale"] == first["scale"] for part in held)
    if len(held) == len(parts) and alike:
        a, b = first["a"], layer.fused([part["b"] for part in held])
    else:
        a, b = _blocks(layer, parts, scale)
    rank = a.shape[-1]
    if layer.experts is not None:
        a = a.transpose(0, 2, 1).reshape(-1, layer.inputs)
        b = b.transpose(2, 1, 0).reshape(b.shape[-1], -1)
    else:
        a, b = a.T, b.T
    tensors = dict(zip(EMBEDDING if layer.is_embedding else LINEAR, (a, b), strict=True))
    if dora:
        tensors[MAGNITUDE] = layer.fused([part["magnitude"] for part in held])
    return PeftTensors({name: np.ascontiguousarray(array) for name, array in tensors.items()}, rank, scale)


def alpha_for(scale: float, rank: int, *, rslora: bool) -> float:
    """Return the alpha that gives a scale."""
    return scale * (math.sqrt(rank) if rslora else rank)


def _blocks(layer: PeftLayer, parts: Sequence[Arrays | None], scale: float) -> tuple[np.ndarray, np.ndarray]:
    held = [part for part in parts if part is not None]
    a = np.concatenate([part["a"] for part in held], axis=-1)
    blocks = [np.zeros((*a.shape[:-2], a.shape[-1], outputs), a.dtype) for outputs in layer.outputs]
    row = 0
    for part, block in zip(parts, blocks, strict=True):
        if part is not None:
            rank, own = part["a"].shape[-1], float(part["scale"])
            block[..., row : row + rank, :] = part["b"] if own == scale else part["b"] * np.float32(own / scale)
            row += rank
    return a, layer.fused(blocks)
