"""Making adapters, and putting them into the layers of a module."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from easydel.layers.dropout import make_dropout
from easydel.lora.choose import Planned
from easydel.lora.layer import AdapterSpec, LoraAdapter, attach, column_norm, detach, is_adapted
from easydel.lora.weights import adapter_spec, matrix_shape, weight_matrix, weight_name
from easydel.paths import named_modules, named_variables, natural
from easydel.sharding import fit_spec, place
from easydel.stacked import layer_paths

Arrays = Mapping[str, jax.Array]
"""Of one layer's adapter (of a stack with a leading axis of layers): `a`, `b`, `scale` and, with DoRA, `magnitude`."""


def adapted_layers(module: nnx.Module) -> dict[str, Any]:
    """Return the layers that have an adapter by path, as they are stored."""
    found = named_modules(module, by_layer=False).items()
    return {path: layer for path, layer in found if is_adapted(layer)}


def new_arrays(plan: Sequence[Planned], key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Return path → arrays of new adapters, which change nothing yet.

    `A` is drawn from the uniform distribution over ±1/sqrt(in), as PEFT's default (Kaiming's with a=sqrt(5)), `B` is
    zero; of embeddings `A` is zero and `B` standard normal. Layers stored stacked get the numbers that they would get
    one by one.
    """
    paths = sorted((path for planned in plan for path in planned.chosen.paths), key=natural)
    index = {path: place for place, path in enumerate(paths)}
    made = {}
    for planned in plan:
        one, spec = planned.chosen, planned.spec
        places = np.asarray([index[path] for path in one.paths])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        a, b = _drawn(keys, matrix_shape(one.layer, one.stack), spec.rank, isinstance(one.layer, nnx.Embed))
        arrays = {"a": a, "b": b, "scale": jnp.asarray(planned.scales, jnp.float32)}
        if one.stack is None:
            arrays = {name: array[0] for name, array in arrays.items()}
        if spec.dora:
            arrays["magnitude"] = _norms(one.layer)
        made[one.path] = arrays
    for planned in plan:
        if planned.spec.shares is not None:
            made[planned.chosen.path]["a"] = made[planned.spec.shares]["a"]
    return made


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(keys: jax.Array, shape: tuple[int, ...], rank: int, is_embedding: bool) -> tuple[jax.Array, jax.Array]:
    """Return `a` and `b` of as many layers as there are keys."""
    *experts, inputs, outputs = shape
    if is_embedding:
        b = jax.vmap(lambda key: jax.random.normal(key, (rank, outputs)))(keys)
        return jnp.zeros((len(keys), inputs, rank)), b
    bound = 1 / math.sqrt(inputs)
    a = jax.vmap(lambda key: jax.random.uniform(key, (*experts, inputs, rank), minval=-bound, maxval=bound))(keys)
    return a, jnp.zeros((len(keys), *experts, rank, outputs))


def _norms(layer: Any) -> jax.Array:
    graphdef, state = nnx.split(layer)
    return _norms_of(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def _norms_of(graphdef: Any, state: nnx.State) -> jax.Array:
    return column_norm(weight_matrix(nnx.merge(graphdef, state)))


def install(
    layers: Mapping[str, Any], arrays: Mapping[str, Arrays], specs: Mapping[str, AdapterSpec], key: jax.Array
) -> None:
    """Put adapters into layers that have none.

    Args:
        layers: path → layer.
        arrays: path → arrays of its adapter.
        specs: path → what it is like.
        key: of dropout.
    """
    for place_, (path, values) in enumerate(arrays.items()):
        layer, stack = layers[path], layer_paths(path)
        dropout = _dropout(specs[path].dropout, jax.random.fold_in(key, place_), None if stack is None else len(stack))
        adapter = LoraAdapter(values, dropout)
        attach(layer, adapter)
        for name, variable in named_variables(adapter, by_layer=False).items():
            variable.set_value(placed(layer, name, variable.get_value(), stack is not None))
    for path in arrays:
        if (first := specs[path].shares) is not None:
            layers[path].lora.a = layers[first].lora.a


def _dropout(rate: float, key: jax.Array, stack: int | None) -> nnx.Dropout:
    if not rate or stack is None:
        return make_dropout(rate, nnx.Rngs(key))
    parts = [nnx.split(make_dropout(rate, nnx.Rngs(jax.random.fold_in(key, layer)))) for layer in range(stack)]
    return nnx.merge(parts[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in parts)))


def remove(module: nnx.Module) -> None:
    """Take all adapters out of a module; what they learned is not kept."""
    for layer in adapted_layers(module).values():
        detach(layer)


def placed(layer: Any, name: str, array: jax.Array, is_stack: bool) -> jax.Array:
    """Return one of an adapter's arrays where it belongs, as the layer's weight lies."""
    weight = layer.codes if getattr(layer, "is_quantized_layer", False) else getattr(layer, weight_name(layer))
    held = weight.get_value()
    if isinstance(held, jax.core.Tracer) or isinstance(array, jax.core.Tracer):
        return array
    if not isinstance(held.sharding, NamedSharding):
        return jax.device_put(array, held.sharding) if held.committed else array
    spec = PartitionSpec(*tuple(held.sharding.spec)[1 if is_stack else 0 :])
    if getattr(layer, "is_quantized_layer", False):
        spec = layer.kernel_spec(spec)
    wanted = PartitionSpec(*((None,) if is_stack else ()), *adapter_spec(layer, name, spec))
    mesh: Any = held.sharding.mesh
    return place(array, NamedSharding(mesh, fit_spec(wanted, array.shape, mesh)))
