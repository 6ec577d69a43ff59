"""What a training state of adapters leaves to its base: which arrays these are, and how another base is noticed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.errors import CheckpointError
from easydel.lora.describe import adapter_config
from easydel.lora.trees import is_lora, lora_paths
from easydel.paths import named_variables
from easydel.quantization import QuantizedWeight


def base_variables(module: nnx.Module, frozen: frozenset[str]) -> dict[str, nnx.Variable]:
    """Return path → variable of a model's base, as it is stored: frozen parameters that are no adapter's, and codes."""
    return {
        path: variable
        for path, variable in named_variables(module, by_layer=False).items()
        if isinstance(variable, QuantizedWeight)
        or (isinstance(variable, nnx.Param) and path in frozen and not is_lora(variable))
    }


def base_names(state: Any) -> frozenset[str]:
    """Return the names of a state's arrays (`named_arrays`) that belong to its base; none without adapters."""
    module = state.model
    if not lora_paths(module):
        return frozenset()
    return frozenset(
        f"params/{path}" if isinstance(variable, nnx.Param) else f"other/{path}/value"
        for path, variable in base_variables(module, state.frozen).items()
    )


def describe_base(state: Any) -> dict[str, Any]:
    """Return what is noted beside a state's adapters: their config, and a fingerprint of their base."""
    module = state.model
    if not lora_paths(module):
        return {}
    variables = base_variables(module, state.frozen)
    return {"lora": adapter_config(module).to_dict(), "base": fingerprint(variables)}


def fingerprint(variables: Mapping[str, nnx.Variable]) -> str:
    """Return a digest of paths, shapes, types and bits of variables, the same wherever and however these lie."""
    entries = {}
    for path, variable in variables.items():
        array = variable.get_value()
        entries[path] = [list(array.shape), str(array.dtype), _bits(array)]
    sums = jax.device_get({path: entry[2] for path, entry in entries.items()})
    content = {path: [*entry[:2], int(sums[path])] for path, entry in entries.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit)
def _bits(array: jax.Array) -> jax.Array:
    """Return a sum of an array's bits, each weighted by its place: of integers, so that no order of summing matters."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    whole = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(whole.shape):  # along the axes, so that what is split stays where it is
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, whole.shape, axis)
    mixed = (whole ^ (whole >> 15)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return jnp.sum(mixed, dtype=jnp.uint32)


def check_base(about: Mapping[str, Any], own: Mapping[str, Any], where: Any) -> None:
    """Compare what was noted beside a state's adapters with what there is.

    Args:
        about: what was saved (`describe`).
        own: likewise, of this model.
        where: the file, for messages.

    Raises:
        CheckpointError: adapters of another kind, or of another base.
    """
    if about.get("lora") != own.get("lora"):
        raise CheckpointError(
            f"{where}: holds {_said(about.get('lora'))}, but the model has {_said(own.get('lora'))}: apply the same "
            "adapters, or choose another directory"
        )
    if about.get("base") != own.get("base"):
        raise CheckpointError(
            f"{where}: its adapters were trained on another base (other weights, another dtype or quantization, or "
            "layers stored otherwise); load the very model that they were trained on"
        )


def _said(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "no adapters"
    shown = {name: value for name, value in config.items() if value and name != "pattern"}
    return f"adapters of {config['pattern'].count('|') + 1} layers with {shown}"
