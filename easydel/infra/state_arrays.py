"""The arrays of a training state: where each lies, and under which name it is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from easydel.infra.state_base import base_names
from easydel.infra.trainable import choose
from easydel.infra.views import param_arrays
from easydel.paths import flatten, nest, split
from easydel.sharding import gather

PARTS = ("step", "params", "other", "opt_state")
"""The fields of a state that hold arrays."""


def optimizer_shardings(opt_state: Any, params: Mapping[str, Any], whole: Sharding | None) -> Any:
    """Return the sharding of each of an optimizer's arrays.

    One that belongs to a parameter (the path of its place ends in the parameter's, and it has its shape) lies as the
    parameter does; what is left (counters, factored moments) lies whole on every device.

    Args:
        opt_state: arrays, or their shapes.
        params: nested dict of the parameters, or shapes with shardings.
        whole: of everything else.
    """
    leaves = flatten(params, by_layer=False)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            owner = leaves.get("/".join(keys[start:]))
            if owner is not None and tuple(owner.shape) == tuple(leaf.shape):
                return owner.sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, opt_state)


def init_optimizer(init: Callable[[Any], Any], params: dict[str, Any]) -> Any:
    """Make an optimizer's state; on a mesh each array straight where it will lie."""
    whole = everywhere(params)
    if whole is None:
        return init(params)
    places = optimizer_shardings(jax.eval_shape(init, params), params, whole)
    return jax.jit(init, out_shardings=places)(params)


def everywhere(params: dict[str, Any]) -> NamedSharding | None:
    """Return the sharding that holds an array whole on each device of the parameters' mesh; `None` without one."""
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    meshes = (leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding))
    mesh = next(meshes, None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def named_arrays(state: Any) -> dict[str, Any]:
    """Return name → array of a state, such as `params/model/norm/scale` and `opt_state/0/mu/model/norm/scale`.

    Random keys stand there as the integers they are made of. The base of adapters is left out.
    """
    left_out = base_names(state)
    named: dict[str, Any] = {}
    for part in PARTS:
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, part))[0]:
            if (name := "/".join([part, *map(_name, path)])) not in left_out:
                named[name] = _stored(leaf)
    return named


def with_arrays(state: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `state` with the arrays of `named` in place of its own, those of a base aside."""
    left_out = base_names(state)
    fields = {}
    for part in PARTS:
        leaves, structure = jax.tree_util.tree_flatten_with_path(getattr(state, part))
        names = ["/".join([part, *map(_name, path)]) for path, _ in leaves]
        new = [
            leaf if name in left_out else _restored(named[name], leaf)
            for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
        fields[part] = jax.tree.unflatten(structure, new)
    return fields


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _restored(value: Any, like: Any) -> Any:
    if not _is_key(like):
        return value
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(value, impl=kinds[0])


def move_state(state: Any, model: Any) -> Any:
    """Return a state whose parameters lie where those of `model` (the same one, moved) do, the rest after them."""
    graphdef, _, other = split(model)
    params = nest(param_arrays(model))
    trained = choose(params, state.frozen, inside=False)
    if model.is_sharded:
        whole: Any = NamedSharding(model.mesh, PartitionSpec())
        places = optimizer_shardings(state.opt_state, trained, whole)
        opt_state, step = jax.device_put((state.opt_state, state.step), (places, whole))
    else:
        opt_state, step = jax.tree.map(gather, (state.opt_state, state.step))
    return replace(state, step=step, params=params, other=other, opt_state=opt_state, graphdef=graphdef)
