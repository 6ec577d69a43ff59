"""Keys and values of every position so far.

A mask (`easydel.layers.AttentionMask`) says where the new tokens stand: `offset` is the slot of the first, `None` if
nothing was written before. `extend` gives back what the new tokens attend to, with the mask that fits it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from easydel.caching.quantized import States, empty, padded, read, rolled, updated

if TYPE_CHECKING:
    from easydel.layers.attention import AttentionMask

Extended = tuple[Any, jax.Array, jax.Array, "AttentionMask"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionCache:
    """One attention layer's cache.

    Attributes:
        key: `[batch, max_length, kv_heads, head_dim]`, numbers or `QuantizedStates`.
        value: likewise.
    """

    keeps_slots: ClassVar[bool] = True

    key: States
    value: States

    @classmethod
    def create(cls, batch_size: int, max_length: int, kv_heads: int, head_dim: int, dtype: Any) -> Self:
        """Make an empty cache; `dtype` int8 means `QuantizedStates`."""
        shape = (batch_size, max_length, kv_heads, head_dim)
        return cls(key=empty(shape, dtype), value=empty(shape, dtype))

    def extend(self, key: jax.Array, value: jax.Array, mask: AttentionMask) -> Extended:
        """Add new tokens.

        Args:
            key: `[batch, seq, kv_heads, head_dim]`.
            value: likewise.
            mask: of the new tokens over all slots; its `offset` is the slot of the first new one.

        Returns:
            The updated cache, and keys, values and mask to attend with.
        """
        length = key.shape[1]
        cache = self._written(key, value, 0 if mask.offset is None else mask.offset)
        if mask.offset is None:
            return cache, key, value, mask.over(range(length))
        if length == 1:
            return cache, read(cache.key, key.dtype), read(cache.value, value.dtype), mask
        # Several new tokens see one another as they are, behind what was there before.
        places = jnp.arange(self.key.shape[1], dtype=jnp.int32)
        new = mask.offset + jnp.arange(length, dtype=jnp.int32)
        slots = jnp.concatenate([jnp.where(places < mask.offset, places, -1), new])
        keys = jnp.concatenate([read(self.key, key.dtype), key], axis=1)
        values = jnp.concatenate([read(self.value, value.dtype), value], axis=1)
        return cache, keys, values, mask.over(slots, own=length)

    def grow(self, max_length: int) -> Self:
        """Return the cache with room for `max_length` positions."""
        return type(self)(key=padded(self.key, max_length), value=padded(self.value, max_length))

    def crop(self, length: int, index: int) -> Self:
        """Return the cache without the slots from `length` on, of `index` written: they are written over later."""
        del length, index
        return self

    def shift(self, by: Any) -> Self:
        """Return the cache with all that it holds `by` slots further right, int32 `[]`; negative: left."""
        return type(self)(key=rolled(self.key, by), value=rolled(self.value, by))

    def _written(self, key: jax.Array, value: jax.Array, index: Any) -> Self:
        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, (0, index, 0, 0))

        return type(self)(key=updated(self.key, key, write), value=updated(self.value, value, write))
