"""Quantizing the layers of a module in place, and the way back."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from easydel.calls import refuse_shapes
from easydel.distributed import whole
from easydel.native.codes import dequantize
from easydel.quantization.choose import Chosen, chosen_layers
from easydel.quantization.formats import quantize
from easydel.quantization.layer import QuantizedLayer
from easydel.quantization.linear import quantized_layer
from easydel.quantization.methods import check_group_size, method_named
from easydel.quantization.replace import replace_modules
from easydel.quantization.report import quantized_layers, remember_errors
from easydel.sharding import fit_spec


def quantize_module(
    module: Any,
    method: str = "nf4",
    group_size: int = 64,
    pattern: str = ".*",
    calibration: Sequence[Any] | None = None,
) -> None:
    """Quantize the layers of a module in place; see `EasyDeLBaseModule.quantize`."""
    how, group_size = method_named(method), check_group_size(group_size)
    if layers := quantized_layers(module):
        raise ValueError(
            f"the model is quantized already ({next(iter(layers.values())).method!r}, {len(layers)} layers); call "
            "dequantize() first, or quantize the float model with another pattern"
        )
    refuse_shapes(module, "quantize")
    if calibration is not None and not how.is_calibrated:
        raise ValueError(f"calibration is read by 'a8bit' only, not by {method!r}; leave it out")
    chosen = chosen_layers(module, pattern)
    _check_finite(chosen)
    scales: Mapping[str, jax.Array] = {}
    if how.is_calibrated:
        from easydel.quantization.calibration import input_scales

        scales = input_scales(module, chosen, group_size, calibration)
        gc.collect()  # running the model leaves cycles behind, which hold its kernels
    chosen.reverse()
    while chosen:  # a float kernel lives no longer than it takes to quantize it
        one = chosen.pop()
        layer = quantized_layer(one.layer, method, group_size, one.stack)
        fill_layer(layer, one.layer.kernel.get_value(), scales.get(one.path), one.stack)
        replace_modules(module, {id(one.layer): layer})


def dequantize_module(module: nnx.Module) -> None:
    """Replace quantized layers by float ones in place; see `EasyDeLBaseModule.dequantize`."""
    layers = quantized_layers(module)
    if not layers:
        raise ValueError("the model is not quantized: there is nothing to dequantize")
    for layer in layers.values():
        replace_modules(module, {id(layer): restored_layer(layer)})


def restored_layer(layer: QuantizedLayer) -> nnx.Module:
    """Return the float layer that the codes stand for, on a mesh split as the codes are."""
    restored: Any = layer.restored()
    placed = layer.codes.get_value().sharding
    if isinstance(placed, NamedSharding):
        kernel = restored.kernel.get_value()
        stack = kernel.ndim - len(layer.kernel_shape)
        spec = layer.kernel_spec(PartitionSpec(*tuple(placed.spec)[stack:]))
        fitted = fit_spec(PartitionSpec(*(None,) * stack, *spec), kernel.shape, placed.mesh)
        restored.kernel.set_value(jax.device_put(kernel, NamedSharding(placed.mesh, fitted)))
    return restored


def part_shardings(layer: QuantizedLayer, placed: NamedSharding, stack: bool) -> dict[str, NamedSharding]:
    """Return how a layer's codes and scales lie where its float kernel lies as `placed` says."""
    spec = tuple(placed.spec)[1:] if stack else tuple(placed.spec)
    found = {}
    for name, variable in layer.weight_variables().items():
        wanted = PartitionSpec(*((None,) if stack else ()), *layer.spec_of(name, PartitionSpec(*spec)))
        fitted = fit_spec(wanted, variable.get_value().shape, placed.mesh)
        found[name] = NamedSharding(placed.mesh, fitted)
    return found


def _check_finite(chosen: Sequence[Chosen]) -> None:
    bad = [one.paths[0] for one in chosen if not bool(_is_finite(one.layer.kernel.get_value()))]
    if bad:
        raise ValueError(
            f"the kernels of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''} hold infinite or undefined "
            "numbers, which no group can be scaled by; mend them, or leave these layers out by the pattern"
        )


@jax.jit
def _is_finite(kernel: jax.Array) -> jax.Array:
    return jnp.isfinite(kernel).all()


def fill_layer(
    layer: QuantizedLayer, kernel: jax.Array, input_scale: jax.Array | None = None, stack: int | None = None
) -> None:
    """Quantize a kernel into a layer, and remember the error that it makes.

    Args:
        layer: from `quantized_layer`.
        kernel: as the float layer had it.
        input_scale: float32 `[..., in]`; `None`: ones.
        stack: of how many layers.
    """
    parts, error = quantize_parts(layer, kernel, input_scale)
    placed = kernel.sharding
    places: Mapping[str, Any] = {}
    if isinstance(placed, NamedSharding):
        places = part_shardings(layer, placed, stack is not None)
    for name, variable in layer.weight_variables().items():
        variable.set_value(jax.device_put(parts[name], places[name]) if name in places else parts[name])
    remember_errors(layer, [float(value) for value in whole(error).reshape(-1)])


def quantize_parts(
    layer: QuantizedLayer, kernel: jax.Array, input_scale: jax.Array | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return name → array of what a layer holds in place of its kernel, and the relative error of each layer."""
    matrix = layer.as_matrix(kernel)
    if layer.how.is_calibrated and input_scale is None:
        input_scale = jnp.ones(matrix.shape[:-1], jnp.float32)
    codes, scales, error = _quantize(matrix, input_scale, layer.format, layer.group_size, layer.experts_axes)
    parts = {"codes": codes, "scales": scales}
    return parts if input_scale is None else parts | {"input_scale": input_scale}, error


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantize(
    matrix: jax.Array, factor: jax.Array | None, format: str, group_size: int, experts_axes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantize one kernel in one program: nothing but codes, scales and an error leaves it."""
    matrix = matrix.astype(jnp.float32)
    scaled = matrix if factor is None else matrix * factor[..., None]
    codes, scales = quantize(jnp.swapaxes(scaled, -1, -2), format, group_size)
    back = dequantize(codes, scales, kind=format, group_size=group_size, inputs=matrix.shape[-2])
    back = jnp.swapaxes(back, -1, -2)
    back = back if factor is None else back / factor[..., None]
    axes = tuple(range(-2 - experts_axes, 0))
    norm = jnp.sqrt(jnp.sum(matrix**2, axes))
    error = jnp.sqrt(jnp.sum((back - matrix) ** 2, axes)) / jnp.where(norm > 0, norm, 1)
    return codes, scales, error
