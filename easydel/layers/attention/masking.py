"""What becomes of products of queries and keys before they are weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from easydel.layers.attention.bias import AttentionBias
from easydel.layers.attention.mask import AttentionMask


def masked(
    products: jax.Array,
    mask: AttentionMask,
    queries: range,
    keys: range,
    scale: float,
    softcap: float | None,
    bias: AttentionBias | None,
) -> jax.Array:
    """Scale, cap, bias and mask products `[batch, kv_heads, group, queries, keys]` of these places."""
    products = products * scale
    if softcap is not None:
        products = softcap * jnp.tanh(products / softcap)
    if bias is not None:
        added = bias(mask, queries, keys)
        products = products + added.reshape(added.shape[0], *products.shape[1:3], *added.shape[2:])
    visible = mask.visible(queries, keys)
    if visible is None:
        return products
    # Finite, so that a row that sees nothing (padding) gives numbers and not NaN.
    return jnp.where(visible[:, :, None], products, jnp.finfo(jnp.float32).min)
