"""From partition specs to arrays on devices."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from easydel.distributed import from_all, is_apart, warn, whole
from easydel.errors import ShardingError
from easydel.sharding.mesh import AnyMesh, check_mesh
from easydel.sharding.rules import PartitionRules, find_matches, summary


@dataclass(frozen=True)
class DroppedAxis:
    """A mesh axis that a spec asks for and a parameter cannot have.

    Attributes:
        path: of the parameter.
        dimension: which one the axis does not divide.
        size: of the dimension.
        axis: of the mesh.
        parts: the axis's size.
        kept: into how many parts the axes left of it split the dimension already.
    """

    path: str
    dimension: int
    size: int
    axis: str
    parts: int
    kept: int = 1

    @property
    def reason(self) -> str:
        """Why the axis is dropped."""
        times = f" times the {self.kept} parts it has" if self.kept > 1 else ""
        return f"dimension {self.dimension} of size {self.size} is not divisible by {self.axis}={self.parts}{times}"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.axis} dropped"


@dataclass
class FitReport:
    """What had to be given up so that specs fit shapes."""

    dropped: list[DroppedAxis] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return one readable line per dropped axis."""
        return [str(axis) for axis in self.dropped]

    def warn(self) -> None:
        """Emit one summary warning if anything was dropped."""
        if self.dropped:
            warn(
                f"{len(self.dropped)} mesh axis(es) dropped where they do not divide a dimension "
                f"(strict=True makes this an error):\n  {summary(self.lines(), 5)}",
                stacklevel=3,
            )


def fit_spec(
    spec: PartitionSpec,
    shape: tuple[int, ...],
    mesh: AnyMesh,
    *,
    path: str = "",
    report: FitReport | None = None,
    rule: object = None,
) -> PartitionSpec:
    """Drop from `spec` each axis that does not divide its dimension.

    Several axes on one dimension are kept from the left for as long as their product divides it.

    Args:
        spec: what is asked for.
        shape: of the array.
        mesh: a mesh, which need not exist here.
        path: of the array, for messages.
        report: takes down what is dropped.
        rule: where the spec comes from, for messages.

    Raises:
        ShardingError: an axis is not in the mesh, is used twice, or the spec is longer than the shape.
    """
    what = f"{path or shape}: {spec if rule is None else rule}"
    entries = [() if e is None else (e if isinstance(e, tuple) else (e,)) for e in spec]
    axes = [axis for entry in entries for axis in entry]
    if unknown := [axis for axis in axes if axis not in mesh.shape]:
        raise ShardingError(
            f"{what} names {unknown}, but the mesh has axes {tuple(mesh.shape)}; change the rule, or give a mesh with "
            "that axis"
        )
    if len(set(axes)) != len(axes):
        raise ShardingError(f"{what} uses a mesh axis twice; an axis can split one dimension only")
    if len(entries) > len(shape):
        raise ShardingError(f"{what} is longer than the shape {shape}; give at most one entry per dimension")
    fitted: list[Any] = []
    for dim, (entry, size) in enumerate(zip(entries, shape, strict=False)):
        kept: list[str] = []
        for axis in entry:
            parts = math.prod(mesh.shape[a] for a in kept)
            if size % (parts * mesh.shape[axis]) == 0:
                kept.append(axis)
            elif report is not None:
                report.dropped.append(DroppedAxis(path, dim, size, axis, mesh.shape[axis], parts))
        fitted.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    return PartitionSpec(*fitted)


def named_shardings(
    specs: Mapping[str, PartitionSpec],
    shapes: Mapping[str, Any],
    mesh: AnyMesh,
    *,
    strict: bool = False,
    rules: Mapping[str, object] | None = None,
) -> dict[str, NamedSharding]:
    """Fit specs to shapes on a mesh, warning once of what was dropped.

    Args:
        specs: by path.
        shapes: path → anything with a `.shape`.
        mesh: a mesh, which need not exist here.
        strict: raise instead of warning.
        rules: path → where the spec comes from, for messages.

    Raises:
        ShardingError: specs cannot be used on this mesh, or (with `strict`) an axis does not divide its dimension; all
            offenders are listed together.
    """
    check_mesh(mesh)
    report, problems = FitReport(), []
    shardings: dict[str, NamedSharding] = {}
    for path, spec in specs.items():
        shape, rule = tuple(shapes[path].shape), rules[path] if rules else None
        try:
            shardings[path] = NamedSharding(mesh, fit_spec(spec, shape, mesh, path=path, report=report, rule=rule))
        except ShardingError as error:
            problems.append(str(error))
    if problems:
        raise ShardingError("partition rules do not fit the mesh:\n  " + summary(problems))
    if strict and report.dropped:
        raise ShardingError(
            "strict sharding: mesh axes do not divide the parameters (leave strict out to have them dropped, or change "
            "the mesh or the rules):\n  " + summary([_with_rule(axis, rules) for axis in report.dropped])
        )
    report.warn()
    return shardings


def _with_rule(axis: DroppedAxis, rules: Mapping[str, object] | None) -> str:
    return f"{axis.path}: {axis.reason}" + (f", asked for by {rules[axis.path]}" if rules else "")


def rule_shardings(
    rules: PartitionRules, shapes: Mapping[str, Any], mesh: AnyMesh, *, strict: bool = False
) -> dict[str, NamedSharding]:
    """Return the sharding of every parameter by the first rule that matches it.

    Raises:
        ShardingError: the rules do not fit the parameters or the mesh; see `find_matches` and `named_shardings`.
    """
    matches = find_matches(rules, shapes)
    specs = {path: match.spec for path, match in matches.items()}
    return named_shardings(specs, shapes, mesh, strict=strict, rules=matches)


def spread_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec | None:
    """Split the largest divisible dimension over every device of the mesh; `None` if there is none."""
    for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
        if shape[dim] and shape[dim] % mesh.size == 0:
            return PartitionSpec(*(None,) * dim, tuple(mesh.axis_names))
    return None


def place(array: Any, sharding: Sharding) -> Any:
    """Put an array (host or device, sharded or not) where `sharding` says; of a shape, note that it would lie there.

    What lies on a host, or on devices of one process, must be the same in all processes whose devices it goes to.

    Raises:
        ShardingError: it is not.
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    if isinstance(sharding, NamedSharding):
        check_mesh(sharding.mesh, devices=True)
    is_here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if is_here and not sharding.is_fully_addressable:
        return _handed_out(array, sharding)
    return jax.device_put(array, sharding)


def _handed_out(array: Any, sharding: Any) -> jax.Array:
    """Give each device of this process its part of an array that all processes have whole.

    `jax.device_put` does so for some arrays only, and sends them to all processes to compare them.
    """
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _handed_out(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array)
        )
    host = np.asarray(array, order="C")
    sums = from_all(zlib.crc32(host.tobytes()) >> 1)
    if len(set(sums)) > 1:
        raise ShardingError(
            f"an array {host.dtype}{list(host.shape)} that is put on a mesh differs between the processes: make it in "
            "all of them alike, such as with the same seeds"
        )
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(array: Any) -> Any:
    """Bring an array whole onto the first device of this process; of a shape, forget where it would lie.

    With several processes each gets the array; all must call this, in the same order.
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    here = SingleDeviceSharding(jax.local_devices()[0])
    if is_apart(array):
        return jax.device_put(whole(array), here)
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    return jax.device_put(array.addressable_data(0) if spread else array, here)
