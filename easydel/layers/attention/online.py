"""Softmax over keys that come block by block (online softmax, arXiv:1805.02867)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

State = tuple[jax.Array, jax.Array, jax.Array]
"""Of some queries: the largest product so far, the sum of weights relative to it, and the weighted sum of values.

float32 `[batch, kv_heads, group, queries, 1]`, the same, and `[batch, kv_heads, group, queries, dim]`.
"""


def nothing(part: jax.Array, value: jax.Array) -> State:
    """Return the state of queries `[batch, kv_heads, group, queries, dim]` that have seen no key yet."""
    rows = (*part.shape[:-1], 1)
    out = jnp.zeros((*part.shape[:-1], value.shape[-1]), jnp.float32)
    return jnp.full(rows, jnp.finfo(jnp.float32).min), jnp.zeros(rows), out


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
