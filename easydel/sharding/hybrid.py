"""Meshes over a fast and a slow network: what is exchanged most stays on the fast one.

The devices of one group (a TPU slice; elsewhere a process, and with it usually a machine) reach one another quickly. So
each axis is cut in two: over the groups, and inside each. A group is a box of the mesh then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from easydel.errors import ShardingError


def group_of(device: Any) -> int:
    """Return the number of the group that a device belongs to."""
    return device.slice_index if device.platform == "tpu" else device.process_index


def dims_over_groups(dims: Sequence[int], groups: int) -> tuple[int, ...] | None:
    """Share groups out over the axes, the first (the slowest) first.

    Returns:
        For each axis, over how many groups it goes; `None` if the axes do not divide by them.
    """
    found = []
    for dim in dims:
        found.append(math.gcd(dim, groups))
        groups //= found[-1]
    return tuple(found) if groups == 1 else None


def check_dims(over: Sequence[int], dims: Sequence[int], names: Sequence[str], groups: int) -> tuple[int, ...]:
    """Return how many groups each axis goes over, a `-1` among them replaced by what is left.

    Raises:
        ShardingError: they do not fit the axes or the number of groups.
    """
    if len(over) != len(dims) or any(size < 1 and size != -1 for size in over) or list(over).count(-1) > 1:
        raise ShardingError(
            f"dcn_axis_dims={tuple(over)}: give a positive number for each of the axes {tuple(names)}; at most one may "
            "be -1 (inferred)"
        )
    known = math.prod(size for size in over if size != -1)
    found = tuple(groups // known if size == -1 else size for size in over)
    wrong = [f"{n}={d} by {o}" for n, d, o in zip(names, dims, found, strict=True) if o < 1 or d % o]
    if math.prod(found) != groups or wrong:
        raise ShardingError(
            f"dcn_axis_dims={tuple(over)}: there are {groups} groups of devices (TPU slices, else processes), which "
            f"the sizes must multiply to, and each must divide its axis of the mesh {tuple(dims)}"
            + (f"; it does not divide {', '.join(wrong)}" if wrong else "")
        )
    return found


def order_devices(devices: Sequence[Any], dims: Sequence[int], over: Sequence[int]) -> np.ndarray:
    """Return the devices in a mesh's shape.

    Args:
        devices: of several groups, equally many of each.
        dims: size of each axis.
        over: how many groups each axis goes over.
    """
    from jax.experimental import mesh_utils

    inside = tuple(dim // size for dim, size in zip(dims, over, strict=True))
    by_process = devices[0].platform != "tpu"
    return mesh_utils.create_hybrid_device_mesh(inside, tuple(over), devices, process_is_granule=by_process)
