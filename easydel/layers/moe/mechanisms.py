"""Ways to compute gated experts on rows sorted by expert; all give the same numbers.

`down[e](act(gate[e](x)) · up[e](x))` for each row `x` of expert `e`. Shapes: rows `[rows, hidden]`, of which the first
`sizes[0]` belong to expert 0, the next `sizes[1]` to expert 1, …; gate and up `[experts, hidden, intermediate]`, down
`[experts, intermediate, hidden]`. What comes out for rows beyond `sum(sizes)` is not defined.
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

Act = Callable[[jax.Array], jax.Array]
Kernels = tuple[jax.Array, jax.Array, jax.Array]

COPY = 38
"""Copying one expert's weights out of the stack costs a CPU as much as multiplying about half as many rows by them."""


def choose(mechanism: str, rows: jax.Array, kernels: Kernels) -> str:
    """Return the mechanism that `"auto"` stands for here: XLA's grouped product is slow on CPU.

    Raises:
        UnsupportedError: `"grouped"` is asked for where its kernel is not.
    """
    served = all(native.serves_grouped(rows, kernel) for kernel in kernels)
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
    each = rows / experts
    # In sixteens: on CPU blocks of 72 rows measured 15% slower than of 64 or 96.
    sixteens = math.sqrt(COPY * each) // 16 if each > 2 * COPY else math.ceil(1.25 * each / 16)
    return min(16 * int(sixteens), rows)


def grouped(rows: jax.Array, sizes: jax.Array, kernels: Kernels, act: Act, precision: Any) -> jax.Array:
    """Compute with our own grouped matrix product for CPUs, in float32 whatever the precision."""
    del precision
    gate, up, down = kernels
    hidden = act(native.grouped(rows, gate, sizes)) * native.grouped(rows, up, sizes)
    return native.grouped(hidden, down, sizes)


def ragged(rows: jax.Array, sizes: jax.Array, kernels: Kernels, act: Act, precision: Any) -> jax.Array:
    """Compute with XLA's grouped matrix product."""
    gate, up, down = kernels
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, precision=precision)
    return product(act(product(rows, gate)) * product(rows, up), down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def blocks(rows: jax.Array, sizes: jax.Array, kernels: Kernels, act: Act, precision: Any, size: int) -> jax.Array:
    """Compute block by block of `size` rows of one expert, as many as there are: only chosen experts are read.

    `rows` must end with `size` rows that belong to nobody. A block may reach into the rows of the next expert; these
    are computed anew afterwards. Differentiable once, in reverse.
    """

    def step(index: jax.Array, out: jax.Array) -> jax.Array:
        expert, start, _ = _block(sizes, size, index)
        x = jax.lax.dynamic_slice_in_dim(rows, start, size)
        gate, up, down = _of_expert(kernels, expert)
        hidden = act(_dot(x, gate, precision)) * _dot(x, up, precision)
        return jax.lax.dynamic_update_slice_in_dim(out, _dot(hidden, down, precision), start, 0)

    return jax.lax.fori_loop(0, _count(sizes, size), step, jnp.zeros_like(rows))


def _blocks_forward(
    rows: jax.Array, sizes: jax.Array, kernels: Kernels, act: Act, precision: Any, size: int
) -> tuple[jax.Array, Any]:
    """Compute, and keep what gate and up gave."""

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert, start, _ = _block(sizes, size, index)
        x = jax.lax.dynamic_slice_in_dim(rows, start, size)
        gate, up, down = _of_expert(kernels, expert)
        gated, upped = _dot(x, gate, precision), _dot(x, up, precision)
        results = (_dot(act(gated) * upped, down, precision), gated, upped)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, start, 0) for old, new in zip(carry, results, strict=True)
        )

    wide = jnp.zeros((rows.shape[0], kernels[0].shape[2]), rows.dtype)
    out, gated, upped = jax.lax.fori_loop(0, _count(sizes, size), step, (jnp.zeros_like(rows), wide, wide))
    return out, (rows, sizes, kernels, gated, upped)


def _blocks_backward(act: Act, precision: Any, size: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    rows, sizes, kernels, gated, upped = kept

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert, start, end = _block(sizes, size, index)
        x, g, gate_out, up_out = (
            jax.lax.dynamic_slice_in_dim(array, start, size) for array in (rows, gradient, gated, upped)
        )
        g = jnp.where((start + jnp.arange(size) < end)[:, None], g, 0)  # the next expert's rows count there
        gate, up, down = _of_expert(kernels, expert)
        hidden, pull = jax.vjp(lambda a, b: act(a) * b, gate_out, up_out)
        d_gate, d_up = pull(_dot(g, down, precision, (1, 1)))
        d_x = _dot(d_gate, gate, precision, (1, 1)) + _dot(d_up, up, precision, (1, 1))
        d_kernels = (_dot(a, b, precision, (0, 0), jnp.float32) for a, b in ((x, d_gate), (x, d_up), (hidden, g)))
        d_rows, *sums = carry
        return (
            jax.lax.dynamic_update_slice_in_dim(d_rows, d_x, start, 0),
            *(total.at[expert].add(part) for total, part in zip(sums, d_kernels, strict=True)),
        )

    sums = (jnp.zeros(kernel.shape, jnp.float32) for kernel in kernels)  # an expert may have many blocks
    d_rows, *d_kernels = jax.lax.fori_loop(0, _count(sizes, size), step, (jnp.zeros_like(rows), *sums))
    return d_rows, None, tuple(d.astype(kernel.dtype) for d, kernel in zip(d_kernels, kernels, strict=True))


blocks.defvjp(_blocks_forward, _blocks_backward)


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


def _of_expert(kernels: Kernels, expert: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False) for kernel in kernels)


def _dot(a: jax.Array, b: jax.Array, precision: Any, axes: tuple[int, int] = (1, 0), dtype: Any = None) -> jax.Array:
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=dtype)
