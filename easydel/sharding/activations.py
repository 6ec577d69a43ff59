"""Constraints on activations, spoken in roles (batch, sequence, heads, …) instead of mesh axes.

The mesh is ambient: the base class sets it around a forward pass, layers call `constrain` without
knowing of meshes, and outside any mesh it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.sharding.placement import fit_spec

_MESH: ContextVar[Mesh | None] = ContextVar("easydel_activation_mesh", default=None)

ROLES: dict[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp"),
    "sequence": ("sp",),
    "heads": ("tp",),
    "mlp": ("tp",),
    "vocab": ("tp",),
    "experts": ("ep",),
}


@contextlib.contextmanager
def activation_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Make `mesh` the one that `constrain` uses inside the block (`None`: no constraints)."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def current_mesh() -> Mesh | None:
    """Return the mesh of the forward pass, if there is one."""
    return _MESH.get()


def activation_spec(shape: tuple[int, ...], *roles: str | None) -> PartitionSpec:
    """Return over which axes of the ambient mesh an array is split by the roles of its dimensions.

    Axes that the mesh lacks, or that do not divide a dimension, are left out.
    """
    mesh = _MESH.get()
    if mesh is None:
        return PartitionSpec()
    axes = [tuple(a for a in ROLES[role] if a in mesh.shape) if role else () for role in roles]
    return fit_spec(PartitionSpec(*(entry or None for entry in axes)), shape, mesh)


def constrain(x: jax.Array, *roles: str | None) -> jax.Array:
    """Ask the compiler to split the dimensions of `x` by their roles, one role (or `None`) per dimension.

    Axes that the mesh lacks, or that do not divide a dimension, are left out. Only under `jit`: an eager
    array stays where it is.
    """
    mesh = _MESH.get()
    if mesh is None or is_on_one_device() or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(x.shape, *roles)))


def at_use(weight: jax.Array, x: jax.Array, *roles: str | None) -> jax.Array:
    """Ask the compiler to gather a weight over the axes that split the batch, before it meets `x` `[batch, …]`.

    Both are split over `fsdp`, so one must move. Told so, the compiler gathers each weight once; left to itself it may
    gather it twice, or permute it first. Where `fsdp` does not split the batch, as when one prompt is continued, the
    weight stays where it is: parts of products are less to send. Roles as for `constrain`, of the weight's dimensions.
    """
    mesh = _MESH.get()
    if mesh is None or mesh.shape.get("fsdp", 1) == 1:
        return weight
    batch = activation_spec(x.shape[:1], "batch")[0]
    return constrain(weight, *roles) if "fsdp" in (batch if isinstance(batch, tuple) else (batch,)) else weight


def is_gathering(primitive: Any, params: Mapping[str, Any]) -> bool:
    """Whether an operation of a jaxpr gathers over `fsdp`: it asks for something whole there.

    What it gives must not be kept for the backward pass of a scan: every device would hold the weights of all layers
    whole. Gathering once more is what splitting them costs.
    """
    if primitive.name != "sharding_constraint" or not isinstance(params["sharding"], NamedSharding):
        return False
    axes = {axis for entry in params["sharding"].spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return params["sharding"].mesh.shape.get("fsdp", 1) > 1 and "fsdp" not in axes


def sequence_is_split() -> bool:
    """Whether the ambient mesh splits sequences, so that batch and sequence must not be merged into one dimension."""
    mesh = _MESH.get()
    return mesh is not None and mesh.shape.get("sp", 1) > 1


def is_on_one_device() -> bool:
    """Whether the forward pass runs without a mesh, or on a mesh of one device."""
    mesh = _MESH.get()
    return mesh is None or mesh.size == 1
