"""The device mesh: five named axes over all devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from easydel.errors import ShardingError
from easydel.sharding.hybrid import check_dims, dims_over_groups, group_of, order_devices

AXIS_NAMES = ("dp", "fsdp", "ep", "tp", "sp")
"""Data, fully-sharded data, expert, tensor and sequence parallelism."""

DEFAULT_AXIS_DIMS = (1, -1, 1, 1, 1)
"""All devices on `fsdp`."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or one that need not exist here."""


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
    dcn_axis_dims: Sequence[int] | None = None,
) -> Mesh:
    """Build a mesh with automatic (compiler-partitioned) axes.

    Where there are several groups of devices between which the network is slow (TPU slices, elsewhere processes), each
    group is a box of the mesh, and the first axes that divide by their number go from group to group.

    Args:
        axis_dims: size of each axis; one may be `-1` and is inferred.
        axis_names: names of the axes, in the same order.
        devices: the devices to use, all of this run's by default.
        dcn_axis_dims: over how many groups each axis goes; one may be `-1`. `None`: as said above; devices that are
            given then stay in their order.

    Raises:
        ShardingError: the sizes do not fit the number of devices, or of groups.
    """
    names = tuple(axis_names)
    if len(set(names)) != len(names):
        raise ShardingError(f"mesh axis names must differ, got {names}")
    chosen = list(jax.devices() if devices is None else devices)
    dims = resolve_axis_dims(axis_dims, len(chosen), names)
    types = (AxisType.Auto,) * len(names)
    groups = len({group_of(device) for device in chosen})
    over = None
    if dcn_axis_dims is not None:
        over = check_dims(dcn_axis_dims, dims, names, groups)
    elif devices is None:
        over = dims_over_groups(dims, groups)
    if over is not None and groups > 1:
        return Mesh(order_devices(chosen, dims, over), names, axis_types=types)
    # jax.make_mesh orders devices by their network topology, which plain reshaping does not.
    if devices is None:
        return jax.make_mesh(dims, names, axis_types=types)
    return Mesh(np.asarray(chosen).reshape(dims), names, axis_types=types)


def abstract_mesh(axes: Mapping[str, int] | Sequence[int], axis_names: Sequence[str] = AXIS_NAMES) -> AbstractMesh:
    """Describe a mesh that need not exist here.

    Args:
        axes: size by axis (those left out have size 1), or one size for each of `axis_names`.
        axis_names: names of all axes, in order.

    Raises:
        ShardingError: an axis that is none of `axis_names`, a size that is no positive integer, or a wrong number of
            sizes.
    """
    names = tuple(axis_names)
    if isinstance(axes, Mapping):
        if unknown := [name for name in axes if name not in names]:
            raise ShardingError(f"mesh {dict(axes)}: no axis is called {unknown}; the axes are {', '.join(names)}")
        sizes: tuple[Any, ...] = tuple(axes.get(name, 1) for name in names)
    else:
        sizes = tuple(axes)
    if len(sizes) != len(names):
        raise ShardingError(f"{len(sizes)} mesh dimensions {sizes} for {len(names)} axes {names}: give one per axis")
    shown = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ShardingError(
            f"mesh ({shown}): every size must be a positive integer (-1 is inferred only for devices that are here, by "
            "create_mesh)"
        )
    return AbstractMesh(tuple(map(int, sizes)), names, axis_types=(AxisType.Auto,) * len(names))


def as_mesh(mesh: Any, axis_names: Sequence[str] = AXIS_NAMES) -> AnyMesh:
    """Return a mesh as it is, and describe one for a mapping of axis sizes or for a size per axis."""
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh
    if isinstance(mesh, Mapping | list | tuple):
        return abstract_mesh(mesh, axis_names)
    raise ShardingError(
        f"mesh: expected a jax.sharding.Mesh or AbstractMesh, a mapping such as {{'fsdp': 4, 'tp': 2}} or one size per "
        f"axis of {tuple(axis_names)}, got {type(mesh).__name__}"
    )


def check_mesh(mesh: Any, *, devices: bool = False) -> None:
    """Check what was given as a mesh; with `devices`, that it has some.

    Raises:
        ShardingError: it is none; the message says how to make one.
    """
    if not isinstance(mesh, Mesh if devices else Mesh | AbstractMesh):
        raise ShardingError(
            f"mesh: expected a jax.sharding.Mesh of devices, got {type(mesh).__name__}; make one with "
            "easydel.sharding.create_mesh((1, 4, 1, 2, 1)), sizes of the axes dp, fsdp, ep, tp, sp"
        )


def parse_mesh(text: str, axis_names: Sequence[str] = AXIS_NAMES) -> AbstractMesh:
    """Read a mesh from `fsdp=4,tp=2`.

    Raises:
        ShardingError: something else, an axis twice, or what `abstract_mesh` refuses.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not name or not equals or not size.removeprefix("-").isdecimal():
            raise ShardingError(f"mesh {text!r}: expected axis=size pairs such as fsdp=4,tp=2, got {part.strip()!r}")
        if name in axes:
            raise ShardingError(f"mesh {text!r}: the axis {name} is given twice")
        axes[name] = int(size)
    return abstract_mesh(axes, axis_names)
