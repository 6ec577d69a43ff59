"""Keys and values of every position so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from easydel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionCache:
    """One attention layer's cache: `key`, `value` `[batch, max_length, kv_heads, head_dim]`."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def create(cls, batch_size: int, max_length: int, kv_heads: int, head_dim: int, dtype: Any) -> AttentionCache:
        """Make an empty cache."""
        shape = (batch_size, max_length, kv_heads, head_dim)
        return cls(key=_zeros(shape, dtype), value=_zeros(shape, dtype))

    def update(self, key: jax.Array, value: jax.Array, index: jax.Array) -> AttentionCache:
        """Return the cache with `key`, `value` `[batch, seq, kv_heads, head_dim]` written from slot `index` on."""
        at = (0, index, 0, 0)
        return AttentionCache(
            key=_constrained(jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), at)),
            value=_constrained(jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), at)),
        )

    def grow(self, max_length: int) -> AttentionCache:
        """Return the cache with room for `max_length` positions."""
        more = ((0, 0), (0, max_length - self.key.shape[1]), (0, 0), (0, 0))
        return AttentionCache(key=_constrained(jnp.pad(self.key, more)), value=_constrained(jnp.pad(self.value, more)))


def _zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return _constrained(jnp.zeros(shape, dtype))


def _constrained(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", None, "heads", None)
