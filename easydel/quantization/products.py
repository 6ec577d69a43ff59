"""Products with quantized weights; the one place that chooses how they are computed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from easydel import native
from easydel.native.codes import Kind, dequantize, grouped, is_packed, unpack
from easydel.quantization import pallas
from easydel.quantization.formats import LARGEST
from easydel.sharding import is_on_one_device

LARGEST_PARTS = 2**26
"""How many partial sums of groups may exist at once."""


def choose(x: jax.Array, codes: jax.Array, group_size: int) -> str:
    """Return the form in which a product is computed here.

    Returns:
        `"rows"`: few rows and a weight on one device, by a kernel that reads nothing but codes and scales (C++ on CPUs,
        Pallas on NVIDIA GPUs; XLA's form of the same where there is none); `"whole"`: the weight is made, then
        multiplied, anything else.
    """
    few = x.ndim == 2 and 0 < x.shape[0] <= native.MOST_ROWS and codes.ndim == 2
    return "rows" if few and group_size % 2 == 0 and is_on_one_device() else "whole"


def quantized_product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    format: Kind,
    group_size: int,
    precision: Any = None,
) -> jax.Array:
    """Multiply `x` by a quantized weight: `x · dequantize(codes, scales)ᵀ`. Differentiable once, in reverse, by `x`.

    The float weight is made anew for the gradient: kept between the passes, a model's would all be there at once.

    Args:
        x: floating point `[rows, in]` (or `[..., in]`).
        codes: of the weight, see `easydel.quantization.formats`.
        scales: float32 `[out, groups]`.
        format: of the codes.
        group_size: inputs that share a scale.
        precision: of the matrix product.

    Returns:
        `[rows, out]` in the dtype of `x`, summed in float32.
    """
    if choose(x, codes, group_size) == "rows":
        return pallas.quantized_rows(x, codes, scales, kind=format, group_size=group_size)
    return _whole(x, codes, scales, format, group_size, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _whole(
    x: jax.Array, codes: jax.Array, scales: jax.Array, format: Kind, group_size: int, precision: Any
) -> jax.Array:
    return _dot(x, _weight(codes, scales, x.shape[-1], x, format, group_size), 1, precision)


def _whole_forward(x: jax.Array, codes: jax.Array, scales: jax.Array, *how: Any) -> tuple[jax.Array, Any]:
    return _whole(x, codes, scales, *how), _kept(x, codes, scales)


def _kept(x: jax.Array, codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, ...]:
    """Return what a gradient needs. Of `x` that is type and width: an array of no rows keeps both."""
    return jnp.zeros((0, x.shape[-1]), x.dtype), codes, scales


def _whole_backward(format: Kind, group_size: int, precision: Any, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    like, codes, scales = kept
    weight = _weight(codes, scales, like.shape[-1], gradient, format, group_size)
    return _dot(gradient, weight, 0, precision), None, None


_whole.defvjp(_whole_forward, _whole_backward)


def _weight(
    codes: jax.Array, scales: jax.Array, inputs: int, other: jax.Array, format: Kind, group_size: int
) -> jax.Array:
    """Return the float weight `[out, in]` to multiply `other` by, in its dtype."""
    options: dict[str, Any] = {"kind": format, "group_size": group_size, "inputs": inputs}
    if codes.ndim == 2 and is_on_one_device():
        return native.dequantized(codes, scales, after=other, **options).astype(other.dtype)
    return dequantize(codes, scales, dtype=other.dtype, **options)


def _dot(x: jax.Array, weight: jax.Array, axis: int, precision: Any = None) -> jax.Array:
    """Contract the last axis of `x` with one of the weight, in the dtype of `x`, summed in float32."""
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    return jax.lax.dot_general(x, weight, contracted, **options).astype(x.dtype)


def integer_product(x: jax.Array, codes: jax.Array, scales: jax.Array, *, format: Kind, group_size: int) -> jax.Array:
    """Multiply activations, quantized here, by a quantized weight; products of codes are summed as integers.

    Each token's activations get the weight's integer format with one scale, `s = max|x| / 127` (`/ 7`), and codes
    `round(x / s)`. Then `y[o] = s · Σ_g scales[o, g] · Σ_{i in g} codes_x[i] · codes[o, i]`, the inner sum in int32,
    the outer in float32. Backwards, rounding counts as the identity (the straight-through estimator,
    arXiv:1308.3432), so that the gradient by `x` is that of a product with the dequantized weight.

    Args:
        x: floating point `[..., in]`.
        codes: of the weight, in an integer format.
        scales: float32 `[out, groups]`.
        format: `"int8"` or `"int4"`, of both sides.
        group_size: inputs that share a scale.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    return _integer(x, codes, scales, format, group_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _integer(x: jax.Array, codes: jax.Array, scales: jax.Array, format: Kind, group_size: int) -> jax.Array:
    given, of_tokens = quantize_tokens(x, format)
    if choose(x, codes, group_size) == "rows":
        out = native.integer_rows(given, codes, scales, kind=format, group_size=group_size)
        return (out * of_tokens).astype(x.dtype)
    whole = unpack(codes, format, x.shape[-1]) if is_packed(format) else codes
    width = min(group_size, x.shape[-1])
    weights = grouped(whole, width)  # [out, groups, width]
    rows = grouped(given, width).reshape(-1, *weights.shape[1:])

    def products(block: jax.Array) -> jax.Array:
        numbers = (((2,), (2,)), ((1,), (1,)))
        sums = jax.lax.dot_general(block, weights, numbers, preferred_element_type=jnp.int32)  # [groups, rows, out]
        return jnp.einsum("gro,og->ro", sums.astype(jnp.float32), scales, precision=jax.lax.Precision.HIGHEST)

    most = max(1, LARGEST_PARTS // max(1, scales.size))
    if rows.shape[0] <= most:
        out = products(rows)
    else:
        out = jax.lax.map(lambda row: products(row[None])[0], rows, batch_size=most)
    out = out.reshape(*x.shape[:-1], codes.shape[0])
    return (out * of_tokens).astype(x.dtype)


def quantize_tokens(x: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    """Quantize each token's activations with one scale: codes int8 `[..., in]`, scales float32 `[..., 1]`."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST[format]
    codes = jnp.round(jnp.where(scales > 0, x / jnp.where(scales > 0, scales, 1), 0))
    return jnp.clip(codes, -LARGEST[format], LARGEST[format]).astype(jnp.int8), scales


def _integer_backward(format: Kind, group_size: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    given, *rest = _whole_backward(format, group_size, None, kept, gradient.astype(jnp.float32))
    return given.astype(kept[0].dtype), *rest


def _integer_forward(
    x: jax.Array, codes: jax.Array, scales: jax.Array, format: str, group_size: int
) -> tuple[jax.Array, Any]:
    return _integer(x, codes, scales, format, group_size), _kept(x, codes, scales)


_integer.defvjp(_integer_forward, _integer_backward)
