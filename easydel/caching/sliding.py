"""Keys and values of the last positions that a window reaches, in a ring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from easydel.caching.attention import Extended
from easydel.caching.quantized import States, empty, padded, read, rolled, updated

if TYPE_CHECKING:
    from easydel.layers.attention import AttentionMask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlidingCache:
    """One layer's ring: slot `t` of the sequence lies at `t mod size`, where it overwrites slot `t - size`.

    Attributes:
        key: `[batch, size, kv_heads, head_dim]`, `size = min(window, max_length)`, numbers or `QuantizedStates`.
        value: likewise.
        window: how many slots a query sees, itself included (static).
    """

    keeps_slots: ClassVar[bool] = True

    key: States
    value: States
    window: int = field(metadata={"static": True})

    @classmethod
    def create(cls, batch_size: int, max_length: int, window: int, kv_heads: int, head_dim: int, dtype: Any) -> Self:
        """Make an empty cache; `dtype` int8 means `QuantizedStates`."""
        shape = (batch_size, min(window, max_length), kv_heads, head_dim)
        return cls(key=empty(shape, dtype), value=empty(shape, dtype), window=window)

    @property
    def size(self) -> int:
        """The number of positions held."""
        return self.key.shape[1]

    def extend(self, key: jax.Array, value: jax.Array, mask: AttentionMask) -> Extended:
        """Add new tokens; see `AttentionCache.extend`."""
        length = key.shape[1]
        if mask.offset is None:
            return self._written(key, value, 0), key, value, mask.over(range(length))
        if length == 1:  # the slot it overwrites is one that it does not see
            cache = self._written(key, value, mask.offset)
            slots = self._slots(mask.offset + 1)
            return cache, read(cache.key, key.dtype), read(cache.value, value.dtype), mask.over(slots)
        # The first of several new tokens still see what the last ones overwrite.
        slots = jnp.concatenate([self._slots(mask.offset), mask.offset + jnp.arange(length, dtype=jnp.int32)])
        keys = jnp.concatenate([read(self.key, key.dtype), key], axis=1)
        values = jnp.concatenate([read(self.value, value.dtype), value], axis=1)
        return self._written(key, value, mask.offset), keys, values, mask.over(slots, own=length)

    def grow(self, max_length: int) -> Self:
        """Return the cache for sequences of up to `max_length` positions; a full ring stays as it is."""
        # A ring smaller than its window was as long as the sequence could get: nothing has wrapped around yet.
        size = min(self.window, max_length)
        return self._with(padded(self.key, size), padded(self.value, size))

    def crop(self, length: int, index: int) -> Self:
        """Return the cache without the slots from `length` on, of `index` written.

        Raises:
            ValueError: slots before `length` that its last token still saw were written over.
        """
        if length < index and index > self.size:
            raise ValueError(
                f"a ring of {self.size} slots, of which {index} were written, cannot be cropped to {length}: what came "
                f"before is written over; keep a cache of no more than {self.size} slots to crop, or one to go on from"
            )
        return self

    def shift(self, by: Any) -> Self:
        """Return the cache with all that it holds `by` slots further right, int32 `[]`; negative: left."""
        return self._with(rolled(self.key, by), rolled(self.value, by))

    def _slots(self, written: jax.Array) -> jax.Array:
        """Return the slot of the sequence that each place of the ring holds, negative where it holds none."""
        return written - 1 - (written - 1 - jnp.arange(self.size, dtype=jnp.int32)) % self.size

    def _written(self, key: jax.Array, value: jax.Array, first: Any) -> Self:
        kept = min(key.shape[1], self.size)
        first = first + key.shape[1] - kept
        at = first % self.size
        places = (first + jnp.arange(kept, dtype=jnp.int32)) % self.size

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            if kept == 1 or (isinstance(first, int) and first == 0):
                return jax.lax.dynamic_update_slice(old, new, (0, at, 0, 0))
            return old.at[:, places].set(new)

        return self._with(updated(self.key, key[:, -kept:], write), updated(self.value, value[:, -kept:], write))

    def _with(self, key: States, value: States) -> Self:
        return type(self)(key=key, value=value, window=self.window)
