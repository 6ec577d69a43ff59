"""Keys and values of every position so far.

A mask (`easydel.layers.AttentionMask`) says where the new tokens stand: `offset` is the slot of the first, `None` if
nothing was written before. `extend` gives back what the new tokens attend to, with the mask that fits it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from easydel.sharding import constrain

if TYPE_CHECKING:
    from easydel.layers.attention import AttentionMask

Extended = tuple[Any, jax.Array, jax.Array, "AttentionMask"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionCache:
    """One attention layer's cache: `key`, `value` `[batch, max_length, kv_heads, head_dim]`."""

    keeps_slots: ClassVar[bool] = True

    key: jax.Array
    value: jax.Array

    @classmethod
    def create(cls, batch_size: int, max_length: int, kv_heads: int, head_dim: int, dtype: Any) -> Self:
        """Make an empty cache."""
        shape = (batch_size, max_length, kv_heads, head_dim)
        return cls(key=by_heads(jnp.zeros(shape, dtype)), value=by_heads(jnp.zeros(shape, dtype)))

    def extend(self, key: jax.Array, value: jax.Array, mask: AttentionMask) -> Extended:
        """Add new tokens.

        Args:
            key: `[batch, seq, kv_heads, head_dim]`.
            value: likewise.
            mask: of the new tokens over all slots; its `offset` is the slot of the first new one.

        Returns:
            The updated cache, and keys, values and mask to attend with.
        """
        updated = self._written(key, value, 0 if mask.offset is None else mask.offset)
        if mask.offset is None:
            return updated, key, value, mask.over(range(key.shape[1]))
        return updated, updated.key.astype(key.dtype), updated.value.astype(value.dtype), mask

    def grow(self, max_length: int) -> Self:
        """Return the cache with room for `max_length` positions."""
        more = ((0, 0), (0, max_length - self.key.shape[1]), (0, 0), (0, 0))
        return type(self)(key=by_heads(jnp.pad(self.key, more)), value=by_heads(jnp.pad(self.value, more)))

    def _written(self, key: jax.Array, value: jax.Array, index: Any) -> Self:
        at = (0, index, 0, 0)
        return type(self)(
            key=by_heads(jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), at)),
            value=by_heads(jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), at)),
        )


def by_heads(x: jax.Array) -> jax.Array:
    """Ask for keys or values `[batch, slots, kv_heads, head_dim]` to be split by rows and heads."""
    return constrain(x, "batch", None, "heads", None)
