"""From partition specs to arrays on devices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from easydel.errors import ShardingError


@dataclass
class FitReport:
    """What had to be given up so that specs fit shapes: `(path, dimension, size, axis, axis size)` per dropped axis."""

    dropped: list[tuple[str, int, int, str, int]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return one readable line per dropped axis."""
        return [
            f"{path}: dimension {dim} of size {size} is not divisible by {axis}={parts}; {axis} dropped"
            for path, dim, size, axis, parts in self.dropped
        ]

    def warn(self) -> None:
        """Emit one summary warning if anything was dropped."""
        if self.dropped:
            shown = "\n  ".join(self.lines()[:5])
            more = f"\n  … and {len(self.dropped) - 5} more" if len(self.dropped) > 5 else ""
            warnings.warn(
                f"{len(self.dropped)} mesh axis(es) dropped where they do not divide a dimension "
                f"(strict=True makes this an error):\n  {shown}{more}",
                stacklevel=3,
            )


def fit_spec(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, *, path: str = "", report: FitReport | None = None
) -> PartitionSpec:
    """Drop from `spec` each axis that does not divide its dimension.

    Several axes on one dimension are kept from the left for as long as their product divides it.

    Raises:
        ShardingError: an axis is not in the mesh, is used twice, or the spec is longer than the shape.
    """
    entries = [() if e is None else (e if isinstance(e, tuple) else (e,)) for e in spec]
    axes = [axis for entry in entries for axis in entry]
    if unknown := [axis for axis in axes if axis not in mesh.shape]:
        raise ShardingError(f"{path or shape}: {spec} names {unknown}, but the mesh has axes {tuple(mesh.shape)}")
    if len(set(axes)) != len(axes):
        raise ShardingError(f"{path or shape}: {spec} uses a mesh axis twice")
    if len(entries) > len(shape):
        raise ShardingError(f"{path or shape}: {spec} is longer than the shape {shape}")
    fitted: list[Any] = []
    for dim, (entry, size) in enumerate(zip(entries, shape, strict=False)):
        kept: list[str] = []
        for axis in entry:
            if size % (math.prod(mesh.shape[a] for a in kept) * mesh.shape[axis]) == 0:
                kept.append(axis)
            elif report is not None:
                report.dropped.append((path, dim, size, axis, mesh.shape[axis]))
        fitted.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    return PartitionSpec(*fitted)


def named_shardings(
    specs: Mapping[str, PartitionSpec], shapes: Mapping[str, Any], mesh: Mesh, *, strict: bool = False
) -> dict[str, NamedSharding]:
    """Fit specs to shapes on a mesh, warning once of what was dropped.

    Raises:
        ShardingError: a spec cannot be used on this mesh, or (with `strict`) an axis does not divide its dimension.
    """
    report = FitReport()
    shardings = {
        path: NamedSharding(mesh, fit_spec(spec, tuple(shapes[path].shape), mesh, path=path, report=report))
        for path, spec in specs.items()
    }
    if strict and report.dropped:
        raise ShardingError("strict sharding: specs do not divide the parameters:\n  " + "\n  ".join(report.lines()))
    report.warn()
    return shardings


def spread_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec | None:
    """Split the largest divisible dimension over every device of the mesh; `None` if there is none."""
    for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
        if shape[dim] and shape[dim] % mesh.size == 0:
            return PartitionSpec(*(None,) * dim, tuple(mesh.axis_names))
    return None


def place(array: Any, sharding: Sharding) -> jax.Array:
    """Put an array (host or device, sharded or not) where `sharding` says."""
    return jax.device_put(array, sharding)


def gather(array: Any) -> jax.Array:
    """Bring an array whole onto the first device of this process."""
    return jax.device_put(array, SingleDeviceSharding(jax.local_devices()[0]))
