"""Attention of one token in each row, by a kernel of our own where all is on one CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from easydel import native
from easydel.layers.attention.mask import AttentionMask
from easydel.sharding import is_on_one_device


def is_one_query(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether `one_query` is the better way: one token in each row, float32, and nothing is split."""
    return is_on_one_device() and native.serves_one_query(query, key, value)


def one_query(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    otherwise: Callable[..., tuple[jax.Array, Any]],
) -> jax.Array:
    """Compute attention of one token in each row; keys outside of all that is seen are not read.

    Args:
        query: `[batch, 1, heads, dim]`.
        key: `[batch, keys, kv_heads, dim]`.
        value: likewise.
        mask: who may attend to whom.
        scale: factor of the products.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        otherwise: the same as `(query, key, value, mask) -> (out, …)`, elsewhere than on a CPU and for derivatives.
    """
    visible = mask.visible(range(1), range(key.shape[1]))
    shape = (query.shape[0], key.shape[1])
    seen = jnp.ones(shape, bool) if visible is None else jnp.broadcast_to(visible[:, 0, 0], shape)

    def reference(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
        return otherwise(query, key, value, AttentionMask(key_valid=seen, causal=False))[0]

    return native.one_query(query, key, value, seen, scale=scale, softcap=softcap, reference=reference)
