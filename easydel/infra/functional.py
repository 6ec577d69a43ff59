"""From a module to pure functions and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.paths import named_variables, split, to_state
from easydel.stacked import layer_paths


def bind(graphdef: Any, params: Any, other: Any) -> Any:
    """Build a module from its definition, its parameters (nested dict or `nnx.State`) and its other state.

    The variables are the module's own: what it does to them (count random draws) does not show in `other`. Gradients
    for the parameters come out split over the mesh as the parameters are.
    """
    module = nnx.merge(graphdef, to_state(params), other, copy=True)
    placement = getattr(module, "placement", None)
    if placement is not None:
        placement.hold_module(module)
    return module


def pure_function(module: nnx.Module) -> Callable[..., Any]:
    """Return `fn(params, inputs, rngs=None, **static) -> outputs` without side effects.

    `inputs` is a mapping of forward arguments, or an array (the first argument). Dropout is active only if `rngs`
    (a key or `nnx.Rngs`) is given. Changes to non-parameter state are discarded. What must be static under `jax.jit`
    (flags, a `LossConfig`) goes by keyword, not into `inputs`.
    """
    graphdef, _, other = split(module)
    other = jax.tree.map(_constant, other)

    def fn(params: Any, inputs: Any, rngs: jax.Array | nnx.Rngs | None = None, **static: Any) -> Any:
        model = bind(graphdef, params, other)
        set_dropout(model, rngs)
        return model(**inputs, **static) if isinstance(inputs, Mapping) else model(inputs, **static)

    return fn


def _constant(array: Any) -> Any:
    """Return what a function can close over: of an array that every process has whole, this one's copy."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer) or array.is_fully_addressable:
        return array
    if not array.is_fully_replicated:
        return array  # JAX says what is wrong as soon as the function is compiled
    own = array.addressable_data(0)
    if not jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        return np.asarray(own)
    data = jax.numpy.asarray(np.asarray(jax.random.key_data(own)))  # bound to no device
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(own))


def set_dropout(module: nnx.Module, rngs: jax.Array | nnx.Rngs | None) -> None:
    """Turn dropout off (`rngs=None`), or on with keys derived from `rngs`, a different one for each stream."""
    module.set_attributes(deterministic=rngs is None, raise_if_not_found=False)
    if rngs is None:
        return
    key = rngs() if isinstance(rngs, nnx.Rngs) else rngs
    if jax.numpy.issubdtype(key.dtype, jax.numpy.integer):
        key = jax.random.wrap_key_data(key)
    index = {path: n for n, path in enumerate(named_variables(module, nnx.RngKey))}
    for path, variable in named_variables(module, nnx.RngKey, by_layer=False).items():
        stored, layers = variable.get_value(), layer_paths(path)
        if layers is None:
            fresh = jax.random.fold_in(key, index[path])
        else:  # each layer's own
            fresh = jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.asarray([index[p] for p in layers]))
        typed = jax.numpy.issubdtype(stored.dtype, jax.dtypes.prng_key)
        variable.set_value(fresh if typed else jax.random.key_data(fresh))
