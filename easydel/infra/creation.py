"""Models that are made where they will lie, or not at all: shapes and shardings only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.hub.abstract import build_abstract
from easydel.infra import placing
from easydel.infra.construct import construct
from easydel.paths import detached, named_variables, plain_arrays
from easydel.rngs import shape_rngs
from easydel.sharding import PartitionRules, check_mesh, create_arrays, place


def lazy_module(
    cls: Any,
    config: Any,
    mesh: Any,
    rules: PartitionRules | None,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    precision: Any = None,
    strict: bool = False,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Build a module of shapes and shardings; see `EasyDeLBaseModule.lazy_init`.

    `rngs` matter only if a module keeps streams of theirs: without them it is built with those of `shape_rngs`.
    """
    options = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}

    def build() -> Any:
        return construct(cls, config, **options, rngs=shape_rngs() if rngs is None else _copied(rngs))

    module = build_abstract(build)
    mesh = placing.mesh_of(config, mesh)
    rules = placing.rules_in_force(module) if rules is None else rules
    shardings = placing.module_shardings(module, rules, mesh, strict=strict)
    placing.apply_to_arrays(module, lambda path, array: place(array, shardings[path]))
    return module._mark_sharded(mesh)


def sharded_module(
    cls: Any, config: Any, mesh: Any, rules: PartitionRules | None, rngs: nnx.Rngs | None, **options: Any
) -> Any:
    """Build a module straight onto a mesh; see `EasyDeLBaseModule.sharded_init`."""
    mesh = config.mesh if mesh is None else mesh
    check_mesh(mesh, devices=True)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    ordinary = list(rngs) == ["default"]  # then its shapes can be had several times as fast
    module = lazy_module(cls, config, mesh, rules, rngs=None if ordinary else rngs, **options)
    variables, plain = named_variables(module, by_layer=False), plain_arrays(module)
    options = {name: value for name, value in options.items() if name != "strict"}
    usual = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}

    def make() -> list[jax.Array]:
        streams = _copied(rngs)
        built = construct(cls, config, **usual | options, rngs=streams)
        made, kept = named_variables(built, by_layer=False), plain_arrays(built)
        arrays = [*(made[path].get_value() for path in variables), *(getattr(*kept[path]) for path in plain)]
        return arrays + jax.tree.leaves(nnx.state(streams))

    shardings = [variable.get_value().sharding for variable in variables.values()]
    shardings += [getattr(*kept).sharding for kept in plain.values()]
    counts, structure = jax.tree.flatten(nnx.state(rngs))
    arrays = create_arrays(make, [*shardings, *[None] * len(counts)])
    for variable, array in zip(variables.values(), arrays, strict=False):
        variable.set_value(array)
    for (node, name), array in zip(plain.values(), arrays[len(variables) :], strict=False):
        setattr(node, name, nnx.data(array))
    nnx.update(rngs, jax.tree.unflatten(structure, arrays[len(shardings) :]))
    return module


def _copied(rngs: nnx.Rngs) -> nnx.Rngs:
    """Return streams of their own: those of a caller cannot count inside a trace."""
    graphdef, state = nnx.split(rngs)
    return nnx.merge(graphdef, detached(state))
