"""Arrays that lie on the devices of several processes, whole on the host."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PIECE = 64 * 2**20
"""Bytes of an array that are sent to all devices at a time, so that none has to hold all of it beside its share."""


def is_apart(array: Any) -> bool:
    """Whether parts of an array lie with other processes only."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated


def whole(array: Any, *, wanted: bool = True) -> np.ndarray:
    """Return an array on the host, wherever it lies.

    If it `is_apart`, all processes must call this, in the same order; no device then holds more than its share and
    `PIECE` bytes (or one slice of each share along its longest dimension, if that is more).

    Args:
        array: of JAX or numpy.
        wanted: whether this process needs it; else it only hands out its part, and gets an empty array.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not is_apart(array):
        # `addressable_data` keeps what is read out of the array itself, which would remember it.
        return np.asarray(array if array.is_fully_addressable else array.addressable_data(0))
    if not isinstance(array.sharding, NamedSharding):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return _assembled(array, wanted)


def _assembled(array: jax.Array, wanted: bool) -> np.ndarray:
    sharding: Any = array.sharding
    axes = tuple(axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis)
    blocks = _blocks(array, axes)
    local = sharding.shard_shape(array.shape)
    axis = int(np.argmax(local))
    one = len(blocks) * int(np.prod(local, dtype=np.int64)) // local[axis] * array.dtype.itemsize
    width = max(1, min(local[axis], PIECE // max(one, 1)))
    made = np.empty(array.shape if wanted else 0, array.dtype)
    for start in range(0, local[axis], width):
        first = min(start, local[axis] - width)  # the last piece may overlap the one before
        # Waited for also where it is not wanted, or pieces would queue up.
        piece = jax.block_until_ready(_piece(array, np.int32(first), axis, width, sharding, axes))
        if wanted:
            parts = np.asarray(piece.addressable_data(0))
            for part, block in zip(parts, blocks, strict=True):
                made[block][(*[slice(None)] * axis, slice(first, first + width))] = part
    return made


def _blocks(array: jax.Array, axes: tuple[str, ...]) -> list[tuple[slice, ...]]:
    """Return which block of the array each position along the mesh axes holds, the last axis running fastest."""
    sharding: Any = array.sharding
    mesh, indices = sharding.mesh, sharding.devices_indices_map(array.shape)
    places = [tuple(mesh.axis_names).index(axis) for axis in axes]
    others = [place for place in range(mesh.devices.ndim) if place not in places]
    parts = int(np.prod([mesh.devices.shape[place] for place in places]))
    ordered = mesh.devices.transpose(*places, *others).reshape(parts, -1)
    return [indices[device] for device in ordered[:, 0]]


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _piece(
    array: jax.Array, start: Any, axis: int, width: int, sharding: NamedSharding, axes: tuple[str, ...]
) -> jax.Array:
    """Return `[parts, …]` on every device: a slice of each share, `width` along `axis`."""

    def gather(share: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jax.lax.dynamic_slice_in_dim(share, start, width, axis), axes)

    spec, everywhere = sharding.spec, PartitionSpec()
    run = jax.shard_map(gather, mesh=sharding.mesh, in_specs=(spec, everywhere), out_specs=everywhere, check_vma=False)
    return run(array, jnp.asarray(start))
