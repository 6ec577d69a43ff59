"""Products of rows sorted by expert with the experts' quantized weights; the one place that chooses how.

Rows, sizes and what is not defined are as in `easydel.layers.moe.mechanisms`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easydel import native
from easydel.layers.moe.mechanisms import block_size, by_block
from easydel.native.codes import Kind, dequantize
from easydel.quantization.products import integer_product, quantize_tokens, quantized_product

MOST_ROWS = 16
"""Of each expert on average, where making its weight first pays: measured on CPUs for `nf4`; for int8 it is as many."""


class Product(NamedTuple):
    """How to multiply.

    Attributes:
        format: of the codes.
        group_size: inputs that share a scale.
        integers: whether rows become codes, too, with one scale each, as in `integer_product`.
        in_blocks: whether block by block even where there is a kernel for all at once.
        precision: of products of floats.
    """

    format: Kind
    group_size: int
    integers: bool = False
    in_blocks: bool = False
    precision: Any = None


def choose(rows: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, how: Product) -> str:
    """Return the form in which a product is computed here.

    Returns:
        `"groups"`: by the C++ kernel, which reads the codes of those experts that have rows, once; `"blocks"`: block
        by block of one expert's rows, each as a product with a single weight (`easydel.quantization.products`).
    """
    if how.in_blocks or jax.default_backend() != "cpu":
        return "blocks"
    # Of floats, a weight with many rows is better made first; products of integers have nothing faster.
    few = how.integers or rows.shape[0] <= MOST_ROWS * codes.shape[0]
    given = rows.astype(jnp.int8) if how.integers else rows
    options: dict[str, Any] = {"kind": how.format, "group_size": how.group_size}
    return "groups" if few and native.serves_quantized_groups(given, codes, scales, sizes, **options) else "blocks"


def expert_product(rows: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, how: Product) -> jax.Array:
    """Multiply each row by its expert's quantized weight. Differentiable once, in reverse, by `rows`.

    Backwards, rounding of rows counts as the identity (the straight-through estimator, arXiv:1308.3432).

    Args:
        rows: floating `[rows, in]`, sorted by expert.
        codes: `[experts, out, …]`, see `easydel.quantization.formats`.
        scales: float32 `[experts, out, groups]`.
        sizes: int32 `[experts]`, how many rows each expert has.
        how: to multiply.

    Returns:
        `[rows, out]` in the dtype of `rows`, summed in float32 (with integers: in int32 within a group).
    """
    # Inside a function with its own gradient arrays are others: what stacks they are slices of is told anew.
    slices = native.slice_of(codes), native.slice_of(scales)
    return _expert_product(rows, codes, scales, sizes, None if None in slices else slices, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _expert_product(
    rows: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, slices: Any, how: Product
) -> jax.Array:
    if slices is None:
        return _computed(rows, codes, scales, sizes, how)
    held = zip((codes, scales), slices, strict=True)
    with native.kernels_are_sliced(native.Slice(part, of.stack, of.place) for part, of in held):
        return _computed(rows, codes, scales, sizes, how)


def _computed(rows: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, how: Product) -> jax.Array:
    options: dict[str, Any] = {"group_size": how.group_size}
    if choose(rows, codes, scales, sizes, how) == "groups":
        if not how.integers:
            return native.quantized_groups(rows, codes, scales, sizes, kind=how.format, **options)
        given, of_rows = quantize_tokens(rows, how.format)
        out = native.integer_groups(given, codes, scales, sizes, kind=how.format, **options)
        return (out * of_rows).astype(rows.dtype)
    options["format"] = how.format

    def multiply(x: jax.Array, expert: jax.Array) -> jax.Array:
        one = _at(codes, expert), _at(scales, expert)
        if how.integers:
            return integer_product(x, *one, **options)
        return quantized_product(x, *one, precision=how.precision, **options)

    return by_block(multiply, rows, sizes, block_size(rows.shape[0], codes.shape[0]), codes.shape[1])


def _forward(rows: jax.Array, *given: Any) -> tuple[jax.Array, Any]:
    # Of the rows only type and width are needed: an array of no rows keeps both.
    codes, scales, sizes, _, _ = given
    return _expert_product(rows, *given), (jnp.zeros((0, rows.shape[1]), rows.dtype), codes, scales, sizes)


def _backward(how: Product, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    like, codes, scales, sizes = kept

    def multiply(g: jax.Array, expert: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"kind": how.format, "group_size": how.group_size, "inputs": like.shape[1]}
        weight = dequantize(_at(codes, expert), _at(scales, expert), dtype=g.dtype, **options)
        return jax.lax.dot_general(g, weight, (((1,), (0,)), ((), ())), precision=how.precision)

    size = block_size(gradient.shape[0], codes.shape[0])
    return by_block(multiply, gradient, sizes, size, like.shape[1]), None, None, None, None


_expert_product.defvjp(_forward, _backward)


def _at(stack: jax.Array, expert: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False)


def expert_of_rows(sizes: jax.Array, rows: int) -> jax.Array:
    """Return the expert of each of so many rows, int32 `[rows]`; of rows that are nobody's the last one."""
    place = jnp.sum(jnp.cumsum(sizes) <= jnp.arange(rows)[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(place, sizes.size - 1)
