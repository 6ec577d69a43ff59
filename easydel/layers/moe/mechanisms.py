"""Ways to multiply rows, sorted by expert, each by its expert's kernel; all give the same numbers.

Shapes: rows `[rows, in]`, of which the first `sizes[0]` belong to expert 0, the next `sizes[1]` to expert 1, …; kernels
`[experts, in, out]`. What comes out for rows beyond `sum(sizes)` is not defined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from easydel import native
from easydel.errors import UnsupportedError

COPY = 38
"""Copying one expert's weights out of the stack costs a CPU as much as multiplying about half as many rows by them."""


def grouped_product(
    rows: jax.Array, sizes: jax.Array, kernels: jax.Array, *, mechanism: str = "auto", precision: Any = None
) -> jax.Array:
    """Multiply each row by its expert's kernel. Differentiable once, in reverse, by rows and kernels.

    Args:
        rows: floating `[rows, in]`, sorted by expert.
        sizes: int32 `[experts]`, how many rows each expert has.
        kernels: `[experts, in, out]`, of the rows' dtype.
        mechanism: `config.moe_mechanism`: `"auto"`, `"grouped"`, `"blocks"` or `"ragged"`.
        precision: of the product; `"grouped"` computes in float32 whatever it is.

    Returns:
        `[rows, out]`.

    Raises:
        UnsupportedError: `"grouped"` is asked for where its kernel is not.
    """
    mechanism = choose(mechanism, rows, kernels)
    if mechanism == "grouped":
        return native.grouped(rows, kernels, sizes)
    if mechanism == "ragged":
        return jax.lax.ragged_dot(rows, kernels, sizes, precision=precision)
    return blocks(rows, sizes, kernels, precision, block_size(rows.shape[0], kernels.shape[0]))


def choose(mechanism: str, rows: jax.Array, kernels: jax.Array) -> str:
    """Return the mechanism that `"auto"` stands for here: XLA's grouped product is slow on CPU.

    Raises:
        UnsupportedError: `"grouped"` is asked for where its kernel is not.
    """
    served = native.serves_grouped(rows, kernels)
    if mechanism == "grouped" and not served:
        raise UnsupportedError(
            f"moe_mechanism='grouped' needs the C++ kernels and float32, got {rows.dtype}: build them with python -m "
            "easydel.native, or use 'auto'"
        )
    if mechanism != "auto":
        return mechanism
    if jax.default_backend() != "cpu":
        return "ragged"
    return "grouped" if served else "blocks"


def block_size(rows: int, experts: int) -> int:
    """Return how many rows a block should have.

    With `n` rows an expert in blocks of `B`, about `n / B + 1/2` blocks cost `B + COPY / 2` each: least at
    `B = sqrt(COPY · n)`. Where that is no less than `n`, one block for most experts is better: a quarter more than `n`.
    """
    if 2 * rows <= experts:  # hardly two of one expert: blocks of one row read each once, and none is padded
        return 1
    each = rows / experts
    # In sixteens: on CPU blocks of 72 rows measured 15% slower than of 64 or 96.
    sixteens = math.sqrt(COPY * each) // 16 if each > 2 * COPY else math.ceil(1.25 * each / 16)
    return min(16 * int(sixteens), rows)


def by_block(
    multiply: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array, sizes: jax.Array, size: int, width: int
) -> jax.Array:
    """Compute block by block of `size` rows of one expert, as many as there are: only chosen experts are read.

    A block may reach into the rows of the next expert; these are computed anew afterwards. Not differentiable.

    Args:
        multiply: `(rows [size, in], expert) -> [size, width]`.
        rows: `[rows, in]`.
        sizes: int32 `[experts]`.
        size: of a block.
        width: of what comes out.
    """
    padded = _padded(rows, size)

    def step(index: jax.Array, out: jax.Array) -> jax.Array:
        expert, start, _ = _block(sizes, size, index)
        made = multiply(jax.lax.dynamic_slice_in_dim(padded, start, size), expert)
        return jax.lax.dynamic_update_slice_in_dim(out, made.astype(out.dtype), start, 0)

    zeros = jnp.zeros((padded.shape[0], width), rows.dtype)
    return jax.lax.fori_loop(0, _count(sizes, size), step, zeros)[: rows.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blocks(rows: jax.Array, sizes: jax.Array, kernels: jax.Array, precision: Any, size: int) -> jax.Array:
    """Multiply by `by_block`. Differentiable once, in reverse."""

    def multiply(x: jax.Array, expert: jax.Array) -> jax.Array:
        return _dot(x, _of_expert(kernels, expert), precision)

    return by_block(multiply, rows, sizes, size, kernels.shape[2])


def _blocks_forward(
    rows: jax.Array, sizes: jax.Array, kernels: jax.Array, precision: Any, size: int
) -> tuple[jax.Array, Any]:
    return blocks(rows, sizes, kernels, precision, size), (rows, sizes, kernels)


def _blocks_backward(precision: Any, size: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    rows, sizes, kernels = kept
    padded, gradients = _padded(rows, size), _padded(gradient, size)

    def back(g: jax.Array, expert: jax.Array) -> jax.Array:
        return _dot(g, _of_expert(kernels, expert), precision, (1, 1))

    def step(index: jax.Array, sums: jax.Array) -> jax.Array:
        expert, start, end = _block(sizes, size, index)
        x, g = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in (padded, gradients))
        g = jnp.where((start + jnp.arange(size) < end)[:, None], g, 0)  # the next expert's rows count there
        return sums.at[expert].add(_dot(x, g, precision, (0, 0), jnp.float32))

    d_rows = by_block(back, gradient, sizes, size, rows.shape[1])
    sums = jnp.zeros(kernels.shape, jnp.float32)  # an expert may have many blocks
    d_kernels = jax.lax.fori_loop(0, _count(sizes, size), step, sums)
    return d_rows, None, d_kernels.astype(kernels.dtype)


blocks.defvjp(_blocks_forward, _blocks_backward)


def _padded(rows: jax.Array, size: int) -> jax.Array:
    """Let the last block reach beyond the last row."""
    return jnp.pad(rows, ((0, size - 1), (0, 0))) if size > 1 else rows


def _count(sizes: jax.Array, size: int) -> jax.Array:
    """Return the number of blocks."""
    return jnp.sum(-(-sizes // size))


def _block(sizes: jax.Array, size: int, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the expert of a block, its first row, and the end of the expert's rows."""
    counts = -(-sizes // size)
    ends = jnp.cumsum(counts)
    expert = jnp.sum(ends <= index)
    first = index - (ends[expert] - counts[expert])
    end = jnp.cumsum(sizes)[expert]
    return expert, end - sizes[expert] + first * size, end


def _of_expert(kernels: jax.Array, expert: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(kernels, expert, keepdims=False)


def _dot(a: jax.Array, b: jax.Array, precision: Any, axes: tuple[int, int] = (1, 0), dtype: Any = None) -> jax.Array:
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=dtype)
