"""Put one tensor of a file onto its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np

from easydel.hub.safetensors import Index, TensorEntry
from easydel.hub.weight_map import Link

Bounds = tuple[tuple[int, int], ...]
"""First and last plus one, of each dimension of a block."""


def place_link(
    link: Link,
    table: Mapping[str, TensorEntry],
    dtypes: Mapping[str, Any],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """Read the tensors of one link and return its variables' arrays by path.

    Each device is given only its share; where the transform allows it, only that share is read from disk.

    Args:
        link: which tensors make which variables.
        table: the checkpoint's tensors by name.
        dtypes: target dtype by path; `None` keeps the file's.
        shardings: placement by path; a path that is absent goes to the default device.
    """
    entries = [table[source] for source in link.sources]
    targets = enumerate(link.targets)
    if all(_is_apart(shardings.get(path)) for path in link.targets) and _sources(link, 0, _whole(link)) is not None:
        return {path: _place_share(link, n, entries, dtypes[path], shardings[path]) for n, path in targets}
    if len(entries) == 1 and len(link.targets) == 1 and link.targets[0] in shardings:
        path = link.targets[0]
        return {path: _place_slices(link, entries[0], dtypes[path], shardings[path])}
    arrays = link.transform.load([entry.read() for entry in entries], link.target_shapes)
    return {
        path: to_device(_cast(array, dtypes[path]), shardings.get(path))
        for path, array in zip(link.targets, arrays, strict=True)
    }


def to_device(array: np.ndarray, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Turn a host array that nobody else holds into a jax array in the default layout.

    This is the one place that decides how memory is handed over. A contiguous 64-byte aligned buffer is adopted
    without a copy on CPU; a transposed view is copied by XLA's own blocked transpose, which measured twice to three
    times as fast as numpy's. Blocking keeps at most one host tensor alive beside the model.
    """
    if sharding is not None and _is_apart(
        sharding
    ):  # device_put would send the array to all processes, to see that they have the same
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index], order="C"))
    return jax.block_until_ready(jax.device_put(array, sharding, may_alias=True))


def _is_apart(sharding: jax.sharding.Sharding | None) -> bool:
    """Whether some of the devices are another process's."""
    return sharding is not None and not sharding.is_fully_addressable


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return array if dtype is None or array.dtype == dtype else array.astype(dtype)


def _whole(link: Link) -> Index:
    return tuple(slice(0, size) for size in link.target_shapes[0])


def _sources(link: Link, number: int, index: Index) -> list[tuple[int, Index]] | None:
    """Return which blocks of which sources make block `index` of a target; `None`: it takes all of them."""
    blocks = getattr(link.transform, "source_blocks", None)
    if blocks is not None:
        return blocks(number, index, link.target_shapes)
    block = link.transform.source_index(index) if len(link.sources) == len(link.targets) == 1 else None
    return None if block is None else [(0, block)]


def _made(link: Link, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the block that is made of the blocks of `_sources`."""
    make = getattr(link.transform, "load_block", None)
    return link.transform.load(arrays, link.target_shapes)[0] if make is None else make(arrays)


def _place_slices(link: Link, entry: TensorEntry, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    (shape,) = link.target_shapes
    blocks: dict[Bounds, np.ndarray] = {}

    def block(index: Index | None) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in blocks:
            exact = tuple(slice(*bound) for bound in bounds)
            source = link.transform.source_index(exact)
            if source is None:
                part = link.transform.load([entry.read()], link.target_shapes)[0][exact]
            else:
                part = link.transform.load([entry.read(source)], link.target_shapes)[0]
            # Replicas may share this memory: XLA never writes into memory it adopted, even when it is donated.
            blocks[bounds] = np.ascontiguousarray(_cast(part, dtype))
        return blocks[bounds]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, block))


def _place_share(
    link: Link, number: int, entries: Sequence[TensorEntry], dtype: Any, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Read what this process's devices hold of a target, and no byte of a file besides."""
    shape = link.target_shapes[number]
    wanted = {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    around = tuple(
        (min(low for low, _ in pairs), max(high for _, high in pairs)) for pairs in zip(*wanted, strict=True)
    )
    # Side by side they are read at once: a row of the file then lies together.
    together = sum(map(_size, wanted)) == _size(around)

    def read(bounds: Bounds) -> np.ndarray:
        index = tuple(slice(*bound) for bound in bounds)
        sources = _sources(link, number, index)
        assert sources is not None
        return _made(link, [entries[source].read(block, exact=True) for source, block in sources])

    share = read(around) if together else None
    blocks: dict[Bounds, np.ndarray] = {}

    def block(index: Index | None) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in blocks:
            inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, around, strict=True))
            part = read(bounds) if share is None else share[inside]
            blocks[bounds] = np.asarray(_cast(part, dtype), order="C")
        return blocks[bounds]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, block))


def _bounds(index: Index | None, shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def _size(bounds: Bounds) -> int:
    return prod(high - low for low, high in bounds)
