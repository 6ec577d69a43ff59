"""What one device of a ring computes: the turns of the first pass, and those of the backward pass.

With products `s`, weights `p = exp(s - largest) / total` and results `o = p·v`, a gradient `g` of the results gives
`pᵀ·g` to the values and `p · (g·vᵀ - sum(g · o))` to the products (FlashAttention, arXiv:2205.14135, appendix B). What
products are made of, soft-caps, masks and biases included, is left to JAX to differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.masking import masked
from easydel.layers.attention.online import added, nothing

BLOCK = 512
"""Queries at once: of a long sequence, not even the products of a single turn would fit."""


@dataclass(frozen=True)
class Ring:
    """What is static: the mesh axis and its size, and how products are made."""

    axis: str
    parts: int
    scale: float
    softcap: float | None
    precision: Any

    def pass_on(self, tree: Any, by: int = 1) -> Any:
        """Give what this device has to the next one, or to one farther on."""
        return jax.lax.ppermute(tree, self.axis, [(i, (i + by) % self.parts) for i in range(self.parts)])

    def varying(self, tree: Any) -> Any:
        """Mark what is the same on all devices, for now, as each device's own."""
        return jax.tree.map(lambda x: jax.lax.pcast(x, (self.axis,), to="varying"), tree)

    def products(self, query: jax.Array, key: jax.Array, mask: AttentionMask, bias: Any) -> jax.Array:
        """Return masked products, float32 `[batch, kv_heads, group, queries, keys]`."""
        made = jnp.einsum("bkgqd,btkd->bkgqt", query, key, precision=self.precision, preferred_element_type=jnp.float32)
        return masked(made, mask, range(query.shape[3]), range(key.shape[1]), self.scale, self.softcap, bias)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """A block of a device's queries.

    Attributes:
        query: `[batch, kv_heads, group, rows, dim]`.
        first: int32 `[]`, the slot of the first.
        segments: int `[batch, rows]`, or `None`.
    """

    query: jax.Array
    first: jax.Array
    segments: jax.Array | None


def first_pass(
    ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, bias: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute this device's results.

    Args:
        ring: how.
        query: this device's, `[batch, kv_heads, group, queries, dim]`.
        key: this device's, `[batch, keys, kv_heads, dim]`.
        value: likewise.
        mask: of the whole sequence.
        bias: of the whole sequence, or `None`.

    Returns:
        Results `[batch, kv_heads, group, queries, dim]`, and float32 `[batch, kv_heads, group, queries, 1]` the largest
        product of each query, and the sum of its weights relative to it.
    """
    bias = ring.varying(bias)
    turns = _turns(ring, mask, query.shape[3], key.shape[1])
    rows = _rows(ring, query, mask)

    def turn(state: Any, held: tuple[jax.Array, jax.Array], number: Any) -> Any:
        key, value = held
        start = _start(ring, number, key.shape[1])

        def block(_: None, part: Any) -> tuple[None, Any]:
            rows, state = part

            def see() -> Any:
                products = ring.products(rows.query, key, _mask(ring, mask, rows, start, key.shape[1]), bias)
                return added(state, products, value, query.dtype, ring.precision)

            return None, _if_seen(mask, rows, start, key.shape[1], see, state)

        return jax.lax.scan(block, None, (rows, state))[1]

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        held, state = carry
        return (ring.pass_on(held), turn(state, held, number)), None

    state = ring.varying(nothing(rows.query, value))
    (held, state), _ = jax.lax.scan(step, ((key, value), state), jnp.arange(turns - 1))
    largest, total, out = (_joined(x) for x in turn(state, held, turns - 1))
    return (out / total).astype(query.dtype), largest, total


def second_pass(
    ring: Ring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    bias: Any,
    kept: tuple[jax.Array, jax.Array, jax.Array],
    gradient: jax.Array,
    of_reached: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Compute the gradients of this device's queries, keys and values, and of the bias.

    Args:
        ring: how.
        query: as `first_pass` got it, and so on.
        key: likewise.
        value: likewise.
        mask: likewise.
        bias: likewise.
        kept: what `first_pass` returned.
        gradient: of its results.
        of_reached: the gradient of the logarithm of the sum of weights, `largest + log(total)`: a weight's own, which
            adds to that of its product.
    """
    bias = ring.varying(bias)
    turns = _turns(ring, mask, query.shape[3], key.shape[1])
    rows = _rows(ring, query, mask)
    out, largest, total = kept
    along = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True) - of_reached
    fixed = tuple(_blocks(x) for x in (gradient, largest, total, along))

    def turn(held: tuple[jax.Array, jax.Array], sums: Any, of_queries: Any, number: Any) -> tuple[Any, Any]:
        start, keys = _start(ring, number, key.shape[1]), key.shape[1]

        def block(sums: Any, part: Any) -> tuple[Any, Any]:
            rows, of_query, fixed = part

            def see() -> Any:
                seen = _mask(ring, mask, rows, start, keys)
                return _summed((sums, of_query), _gradients(ring, rows.query, *held, seen, bias, fixed))

            return _if_seen(mask, rows, start, keys, see, (sums, of_query))

        return jax.lax.scan(block, sums, (rows, of_queries, fixed))

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        held, sums, of_queries = carry
        (*of_held, of_bias), of_queries = turn(held, sums, of_queries, number)
        return (ring.pass_on(held), (*ring.pass_on(of_held), of_bias), of_queries), None

    zeros = ring.varying(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), ((key, value, bias), rows.query)))
    (held, sums, of_queries), _ = jax.lax.scan(step, ((key, value), *zeros), jnp.arange(turns - 1))
    (*of_held, of_bias), of_queries = turn(held, sums, of_queries, turns - 1)
    of_key, of_value = ring.pass_on(of_held, 1 - turns)  # home
    of_bias = jax.tree.map(lambda given, x: jax.lax.psum(x, ring.axis).astype(given.dtype), bias, of_bias)
    return _joined(of_queries).astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype), of_bias


def _gradients(
    ring: Ring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    bias: Any,
    fixed: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, jax.Array, Any], jax.Array]:
    """Return what these queries and keys add to the gradients of keys, values and bias, and of the queries.

    Args:
        ring: how.
        query: `[batch, kv_heads, group, rows, dim]`.
        key: `[batch, keys, kv_heads, dim]`.
        value: likewise.
        mask: of these.
        bias: of the whole sequence, or `None`.
        fixed: of the queries, the gradient of their results, the largest product, the sum of weights relative to it,
            and what is subtracted of each weight's gradient.
    """
    gradient, largest, total, along = fixed
    products, pull = jax.vjp(lambda query, key, bias: ring.products(query, key, mask, bias), query, key, bias)
    weights = jnp.exp(products - largest) / total
    options: Any = {"precision": ring.precision, "preferred_element_type": jnp.float32}
    of_value = jnp.einsum("bkgqt,bkgqd->btkd", weights.astype(value.dtype), gradient, **options)
    of_weights = jnp.einsum("bkgqd,btkd->bkgqt", gradient, value, **options)
    of_query, of_key, of_bias = pull(weights * (of_weights - along))
    return (of_key, of_value, of_bias), of_query


def _turns(ring: Ring, mask: AttentionMask, queries: int, keys: int) -> int:
    """Return how many devices' keys any query can see: with a window in causal order, the next ones before it."""
    if mask.window is None or not mask.causal or queries != keys:
        return ring.parts
    return min(ring.parts, (mask.window - 2) // keys + 2)


def _start(ring: Ring, turn: Any, keys: int) -> jax.Array:
    """Return the slot of the first of the keys that this device has in a turn."""
    return (jax.lax.axis_index(ring.axis) - turn) % ring.parts * keys


def _rows(ring: Ring, query: jax.Array, mask: AttentionMask) -> _Rows:
    length = query.shape[3]
    start = jax.lax.axis_index(ring.axis) * length
    blocks = _blocks(query)
    firsts = start + jnp.arange(0, length, blocks.shape[4], dtype=jnp.int32)
    segments = mask.query_segments
    if segments is not None:
        segments = jax.lax.dynamic_slice_in_dim(segments, start, length, axis=1)
        segments = segments.reshape(segments.shape[0], *firsts.shape, -1).swapaxes(0, 1)
    return _Rows(blocks, firsts, segments)


def _blocks(x: jax.Array) -> jax.Array:
    """Cut `[batch, kv_heads, group, queries, …]` into `[blocks, batch, kv_heads, group, rows, …]`."""
    length = x.shape[3]
    most = min(length, BLOCK)
    rows = next(rows for rows in range(most, 0, -1) if length % rows == 0)
    rows = rows if 8 * rows >= most else length  # many small blocks take longer than they are worth
    return jnp.moveaxis(x.reshape(*x.shape[:3], length // rows, rows, *x.shape[4:]), 3, 0)


def _joined(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _mask(ring: Ring, mask: AttentionMask, rows: _Rows, start: jax.Array, keys: int) -> AttentionMask:
    """Return the mask of these queries and of the keys of one device."""
    return replace(mask.cut(start, keys, ring.parts * keys), offset=rows.first, query_segments=rows.segments)


def _if_seen(mask: AttentionMask, rows: _Rows, start: jax.Array, keys: int, see: Callable[[], Any], else_: Any) -> Any:
    """Return `see()` if by causal order and window any of the queries can see any of the keys."""
    seen = []
    if mask.causal:
        seen.append(start < rows.first + rows.query.shape[3])
    if mask.window is not None:
        seen.append(start + keys > rows.first - mask.window + 1)
        if not mask.causal:
            seen.append(start < rows.first + rows.query.shape[3] + mask.window - 1)
    if not seen:
        return see()
    return jax.lax.cond(seen[0] & seen[-1], see, lambda: else_)


def _summed(before: Any, more: Any) -> Any:
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), before, more)
