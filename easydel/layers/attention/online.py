"""Softmax over keys that come block by block (online softmax, arXiv:1805.02867)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

State = tuple[jax.Array, jax.Array, jax.Array]
"""Of some queries: the largest product so far, the sum of weights relative to it, and the weighted sum of values.

float32 `[batch, kv_heads, group, queries, 1]`, the same, and `[batch, kv_heads, group, queries, dim]`.
"""


def nothing(part: jax.Array, value: jax.Array, sinks: jax.Array | None = None) -> State:
    """Return the state of queries `[batch, kv_heads, group, queries, dim]` that have seen no key yet.

    A sink (`sink_column`) is a key that has been seen, whose value is zero.
    """
    rows = (*part.shape[:-1], 1)
    out = jnp.zeros((*part.shape[:-1], value.shape[-1]), jnp.float32)
    if sinks is not None:
        return jnp.broadcast_to(sinks, rows), jnp.ones(rows), out
    return jnp.full(rows, jnp.finfo(jnp.float32).min), jnp.zeros(rows), out


def sink_column(sinks: jax.Array | None, kv_heads: int) -> jax.Array | None:
    """Return logits of sinks `[heads]` as products, float32 `[1, kv_heads, group, 1, 1]`."""
    return None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)


def exponentials(products: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return weights `[…, queries, keys]` that are not normalised yet, and what divides them, `[…, queries, 1]`.

    Args:
        products: of queries and keys, masked, float32 `[batch, kv_heads, group, queries, keys]`.
        sinks: as of `sink_column`; they add to what divides.
    """
    largest = jax.lax.stop_gradient(products.max(axis=-1, keepdims=True))
    if sinks is None:
        weights = jnp.exp(products - largest)
        return weights, weights.sum(axis=-1, keepdims=True)
    largest = jnp.maximum(largest, jax.lax.stop_gradient(sinks))
    weights = jnp.exp(products - largest)
    return weights, weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest)


def added(state: State | None, products: jax.Array, values: jax.Array, dtype: Any, precision: Any) -> State:
    """Add a block of keys.

    Args:
        state: so far; `None`: nothing.
        products: of queries and keys, masked, float32 `[batch, kv_heads, group, queries, keys]`.
        values: of the keys, `[batch, keys, kv_heads, dim]`.
        dtype: of the weights, where they meet the values.
        precision: of that product.
    """
    largest = products.max(axis=-1, keepdims=True)
    if state is not None:
        largest = jnp.maximum(largest, state[0])
    weights = jnp.exp(products - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgqt,btkd->bkgqd",
        weights.astype(dtype),
        values,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if state is None:
        return largest, total, out
    fading = jnp.exp(state[0] - largest)
    return largest, state[1] * fading + total, state[2] * fading + out
