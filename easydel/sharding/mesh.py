"""The device mesh: five named axes over all devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from easydel.errors import ShardingError

AXIS_NAMES = ("dp", "fsdp", "ep", "tp", "sp")
"""Data, fully-sharded data, expert, tensor and sequence parallelism."""

DEFAULT_AXIS_DIMS = (1, -1, 1, 1, 1)
"""All devices on `fsdp`."""


def resolve_axis_dims(dims: Sequence[int], device_count: int, names: Sequence[str] = AXIS_NAMES) -> tuple[int, ...]:
    """Replace a `-1` in `dims` by what is left of `device_count`.

    Raises:
        ShardingError: lengths differ, more than one `-1`, a size below one, or the product is not the device count.
    """
    dims = tuple(int(dim) for dim in dims)
    shown = ", ".join(f"{name}={dim}" for name, dim in zip(names, dims, strict=False))
    if len(dims) != len(names):
        raise ShardingError(
            f"{len(dims)} mesh dimensions {dims} for {len(names)} axes {tuple(names)}: give one per axis"
        )
    if any(dim < 1 and dim != -1 for dim in dims) or dims.count(-1) > 1:
        raise ShardingError(f"mesh ({shown}): every size must be positive, and at most one may be -1 (inferred)")
    known = math.prod(dim for dim in dims if dim != -1)
    if device_count % known or (-1 not in dims and known != device_count):
        raise ShardingError(
            f"mesh ({shown}) needs {'a multiple of ' if -1 in dims else ''}{known} devices, but {device_count} are "
            "here; change sharding_axis_dims, or use -1 for one axis to have it inferred"
        )
    return tuple(device_count // known if dim == -1 else dim for dim in dims)


def create_mesh(
    axis_dims: Sequence[int] = DEFAULT_AXIS_DIMS,
    axis_names: Sequence[str] = AXIS_NAMES,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build a mesh with automatic (compiler-partitioned) axes.

    Args:
        axis_dims: size of each axis; one may be `-1` and is inferred.
        axis_names: names of the axes, in the same order.
        devices: the devices to use, all of this run's by default.

    Raises:
        ShardingError: the sizes do not fit the number of devices.
    """
    names = tuple(axis_names)
    if len(set(names)) != len(names):
        raise ShardingError(f"mesh axis names must differ, got {names}")
    chosen = list(jax.devices() if devices is None else devices)
    dims = resolve_axis_dims(axis_dims, len(chosen), names)
    # jax.make_mesh orders devices by their network topology, which plain reshaping does not.
    if devices is None:
        return jax.make_mesh(dims, names, axis_types=(AxisType.Auto,) * len(names))
    return Mesh(np.asarray(chosen).reshape(dims), names, axis_types=(AxisType.Auto,) * len(names))
