"""NF4 weights as bitsandbytes writes them into safetensors, which transformers reads.

Of a linear layer `x` of `in → out` features such a file holds

- `x.weight`: uint8 `[out · in / 2, 1]`, the codes of the flattened weight `[out, in]`, the first in the high nibble;
- `x.weight.absmax`: float32 `[out · in / blocksize]`, one scale for each `blocksize` codes in a row;
- `x.weight.quant_map`: float32 `[16]`, the code points;
- `x.weight.quant_state.bitsandbytes__nf4`: uint8, the bytes of a JSON object (`quant_type`, `blocksize`, `dtype`,
  `shape`).

With double quantization (QLoRA, arXiv:2305.14314, section 3) `absmax` is uint8, an index into
`x.weight.nested_quant_map` (float32 `[256]`); each `nested_blocksize` of them share a scale in
`x.weight.nested_absmax`, and `nested_offset` is added.

Where `blocksize` divides `in`, these are our codes and scales in other shapes. So a table of such tensors is read as
one of ours, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub.safetensors import Index, TensorEntry, unique_json
from easydel.hub.transforms import Shape
from easydel.quantization.formats import NF4

STATE = ".weight.quant_state.bitsandbytes__"
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' kernels are there for."""

_LONGEST_STATE = 2**16


@dataclass(frozen=True)
class PackNF4:
    """Our codes and scales of one layer ↔ bitsandbytes' tensors, in the order of the module's docstring.

    Attributes:
        shape: of the weight, `(out, in)`.
        blocksize: codes that share a scale.
        dtype: in which the weight was stored before.
    """

    shape: tuple[int, int]
    blocksize: int
    dtype: str

    @property
    def state(self) -> bytes:
        """The JSON object."""
        content = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": self.dtype, "shape": list(self.shape)}
        return json.dumps(content).encode()

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        return [array.reshape(shape) for array, shape in zip(arrays, targets, strict=False)]

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        codes, scales = arrays
        return [codes.reshape(-1, 1), scales.reshape(-1), NF4, np.frombuffer(self.state, np.uint8)]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        codes, scales = targets
        return [(prod(codes), 1), (prod(scales),), (len(NF4),), (len(self.state),)]

    def source_index(self, index: Index) -> Index | None:
        """See `Transform.source_index`."""
        return None


PACKED_SUFFIXES = (".weight", ".weight.absmax", ".weight.quant_map", f"{STATE}nf4")
PACKED_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.float32), np.dtype(np.uint8))


@dataclass(frozen=True)
class NestedScales(TensorEntry):
    """Scales that are quantized themselves: read, they are float32.

    Attributes:
        codes: uint8 `[n]`.
        points: float32 `[256]`.
        absmax: float32 `[ceil(n / blocksize)]`.
        blocksize: codes that share an `absmax`.
        offset: added to each.
    """

    codes: TensorEntry = field(kw_only=True)
    points: TensorEntry = field(kw_only=True)
    absmax: TensorEntry = field(kw_only=True)
    blocksize: int = field(kw_only=True)
    offset: float = field(kw_only=True)

    def read(self, index: Index | None = None, *, exact: bool = False) -> np.ndarray:
        """Return the scales, or the block `index` of them."""
        each = np.repeat(self.absmax.read(), self.blocksize)[: self.codes.shape[0]]
        scales = self.points.read()[self.codes.read()] * each + np.float32(self.offset)
        scales = scales.astype(np.float32).reshape(self.shape)
        return scales if index is None else np.ascontiguousarray(scales[index])


def unpacked_table(table: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], int | None]:
    """Return a checkpoint's table with bitsandbytes' tensors as `x.codes` and `x.scales`, and their block size.

    Raises:
        UnsupportedError: another type of codes, other code points, or blocks that reach over the end of a row.
        CheckpointError: tensors are missing or contradict each other.
    """
    ours = dict(table)
    sizes: dict[int, str] = {}
    for name in [name for name in table if STATE in name]:
        prefix, _, kind = name.partition(STATE)
        state = _state(table[name], kind)
        (out, into), size = state["shape"], state["blocksize"]
        if into % size:
            raise UnsupportedError(
                f"{table[name].file}: {prefix}.weight has {into} inputs in blocks of {size}, so that blocks reach over "
                "the end of a row, which is not supported; quantize the float model here instead"
            )
        sizes.setdefault(size, prefix)
        entries = _entries(table, prefix, state)
        _check_points(entries.pop("quant_map"))
        ours[f"{prefix}.codes"] = replace(entries["weight"], name=f"{prefix}.codes", shape=(out, into // 2))
        ours[f"{prefix}.scales"] = _scales(f"{prefix}.scales", (out, into // size), entries, state)
        for part in [other for other in table if other.startswith(f"{prefix}.weight.")]:
            del ours[part]
        del ours[f"{prefix}.weight"]
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UnsupportedError(
            f"{first} has blocks of {one} and {second} of {other}: several block sizes in one model are not supported"
        )
    return ours, next(iter(sizes), None)


def _state(entry: TensorEntry, kind: str) -> dict[str, Any]:
    if kind != "nf4":
        raise UnsupportedError(f"{entry.file}: {entry.name!r}: {kind!r} codes are not supported, only 'nf4'")
    if entry.dtype != np.uint8 or len(entry.shape) != 1 or entry.nbytes > _LONGEST_STATE:
        raise CheckpointError(f"{entry.file}: {entry.name!r} should be the bytes of a short JSON object, uint8 [n]")
    state = unique_json(entry.read().tobytes(), f"{entry.file}: {entry.name}")
    shape = state.get("shape") if isinstance(state, dict) else None
    size = state.get("blocksize") if isinstance(state, dict) else None
    sound = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not sound or type(size) is not int or size < 2 or state.get("quant_type", "nf4") != "nf4":
        raise CheckpointError(
            f"{entry.file}: {entry.name!r} should say quant_type 'nf4', a blocksize and a shape [out, in], got "
            f"{str(state)[:200]}"
        )
    return state


def _entries(table: Mapping[str, TensorEntry], prefix: str, state: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Return the tensors of one layer by the end of their names, each of the shape and type it must have."""
    out, into = state["shape"]
    blocks = out * into // state["blocksize"]
    nested = f"{prefix}.weight.nested_absmax" in table
    wanted: dict[str, tuple[type, Shape]] = {
        "weight": (np.uint8, (out * into // 2, 1)),
        "weight.absmax": (np.uint8 if nested else np.float32, (blocks,)),
        "weight.quant_map": (np.float32, (16,)),
    }
    if nested:
        size = state.get("nested_blocksize")
        if type(size) is not int or size < 1 or not isinstance(state.get("nested_offset"), int | float):
            raise CheckpointError(f"{prefix}{STATE}nf4: expected nested_blocksize and nested_offset, got {dict(state)}")
        wanted["weight.nested_absmax"] = (np.float32, (-(-blocks // size),))
        wanted["weight.nested_quant_map"] = (np.float32, (256,))
    found = {}
    for suffix, (dtype, shape) in wanted.items():
        entry = table.get(f"{prefix}.{suffix}")
        if entry is not None and type(entry) is not TensorEntry:
            raise UnsupportedError(
                f"{entry.file}: {entry.name!r}: NF4 in pickles is not supported, only in safetensors"
            )
        if entry is None or entry.dtype != dtype or entry.shape != shape:
            got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
            raise CheckpointError(f"{prefix}.{suffix}: expected {np.dtype(dtype)} {shape}, got {got}")
        found[suffix.removeprefix("weight.")] = entry
    return found


def _check_points(entry: TensorEntry) -> None:
    if not np.array_equal(entry.read(), NF4):
        raise UnsupportedError(f"{entry.file}: {entry.name!r} is not the published map of NF4, which is not supported")


def _scales(name: str, shape: Shape, entries: Mapping[str, TensorEntry], state: Mapping[str, Any]) -> TensorEntry:
    absmax = entries["absmax"]
    if "nested_absmax" not in entries:
        return replace(absmax, name=name, shape=shape)
    return NestedScales(
        name,
        np.dtype(np.float32),
        shape,
        absmax.file,
        absmax.start,
        absmax.stop,
        absmax.stamp,
        codes=absmax,
        points=entries["nested_quant_map"],
        absmax=entries["nested_absmax"],
        blocksize=state["nested_blocksize"],
        offset=float(state["nested_offset"]),
    )
