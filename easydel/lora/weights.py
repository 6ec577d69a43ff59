"""The matrices behind layers and adapters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.layers.moe.experts import ExpertLinear
from easydel.quantization.layer import joined_axes


def is_experts(layer: Any) -> bool:
    """Whether a layer, or a class of layers, holds the weights of experts."""
    layer_class = layer if isinstance(layer, type) else type(layer)
    return issubclass(layer_class, ExpertLinear) or getattr(layer_class, "experts_axes", 0) > 0


def weight_name(layer: Any) -> str:
    """Return the name of a layer's weight among the parameters, of a quantized one that of its float kernel."""
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def weight_shape(layer: Any, stack: int | None = None) -> tuple[int, ...]:
    """Return the shape of the weight of one layer; `stack`: of how many layers the variables hold the numbers."""
    if getattr(layer, "is_quantized_layer", False):
        return tuple(layer.kernel_shape)
    shape = tuple(getattr(layer, weight_name(layer)).get_value().shape)
    return shape if stack is None else shape[1:]


def matrix_shape(layer: Any, stack: int | None = None) -> tuple[int, ...]:
    """Return the shape of the weight of one layer with all axes of inputs on one axis, and those of outputs."""
    experts = weight_shape(layer, stack)[:1] if is_experts(layer) else ()
    return (*experts, *_features(layer, stack))


def _features(layer: Any, stack: int | None) -> tuple[int, int]:
    if getattr(layer, "is_quantized_layer", False):
        return layer.features
    if isinstance(layer, nnx.LinearGeneral):
        return math.prod(layer.in_features), math.prod(layer.out_features)
    inputs, outputs = weight_shape(layer, stack)[-2:]
    return inputs, outputs


def weight_matrix(layer: Any) -> jax.Array:
    """Return the weight, float32 `[..., in, out]`, of a quantized layer the values its codes stand for."""
    if getattr(layer, "is_quantized_layer", False):
        return layer.as_matrix(layer.dequantized(jnp.float32))
    weight = getattr(layer, weight_name(layer)).get_value().astype(jnp.float32)
    if not isinstance(layer, nnx.LinearGeneral):
        return weight
    axes = len(layer.in_features) + len(layer.out_features)
    return weight.reshape(*weight.shape[: weight.ndim - axes], *_features(layer, None))


def scaled_product(lora: Any) -> jax.Array:
    """Return `scale · A B` of an adapter, float32 `[..., in, out]`."""
    a, b, scale = (variable.get_value().astype(jnp.float32) for variable in (lora.a, lora.b, lora.scale))
    a = a * scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim))
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def adapter_spec(layer: Any, name: str, weight_spec: PartitionSpec) -> PartitionSpec:
    """Return how one of an adapter's arrays is split where its layer's weight (of one layer) is as `weight_spec` says.

    `A` follows the inputs and `B` the outputs; what is no parameter is whole everywhere.
    """
    experts, inputs, outputs = _sides(layer, weight_spec)
    entries = {"a": (*experts, inputs, None), "b": (*experts, None, outputs), "magnitude": (outputs,)}
    return PartitionSpec(*entries.get(name, ()))


def _sides(layer: Any, spec: PartitionSpec) -> tuple[tuple[Any, ...], Any, Any]:
    """Return the mesh axes of experts, of inputs and of outputs; of several axes, those joined."""
    general = isinstance(getattr(layer, "in_features", None), tuple)
    leading = 1 if is_experts(layer) else 0
    into = len(layer.in_features) if general else 1
    out = len(layer.out_features) if general else 1
    entries = [*spec, *[None] * (leading + into + out - len(spec))]
    rest = entries[leading:]
    return tuple(entries[:leading]), joined_axes(rest[:into]), joined_axes(rest[into:])
