"""The latents of every position so far, from which keys and values are made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

from easydel.caching.quantized import States, empty, padded, read, rolled, updated

if TYPE_CHECKING:
    from easydel.layers.attention import AttentionMask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The cache of one layer of latent attention: `latent_rank + rotary_dim` numbers a token, whatever its heads.

    Attributes:
        parts: what is kept of a token, the latent and behind it the rotated part of the keys, one for all heads: one
            array `[batch, max_length, 1, latent_rank + rotary_dim]`; as int8 two `QuantizedStates`, each with a scale
            of its own, as the two differ in size.
    """

    keeps_slots: ClassVar[bool] = True

    parts: tuple[States, ...]

    @classmethod
    def create(cls, batch_size: int, max_length: int, latent_rank: int, rotary_dim: int, dtype: Any) -> Self:
        """Make an empty cache; `dtype` int8 means `QuantizedStates`."""
        widths = (latent_rank, rotary_dim) if jnp.dtype(dtype) == jnp.int8 else (latent_rank + rotary_dim,)
        return cls(tuple(empty((batch_size, max_length, 1, width), dtype) for width in widths))

    def extend(self, states: jax.Array, mask: AttentionMask) -> tuple[Self, jax.Array, AttentionMask]:
        """Add new tokens.

        Args:
            states: `[batch, seq, 1, latent_rank + rotary_dim]`.
            mask: of the new tokens over all slots; its `offset` is the slot of the first new one.

        Returns:
            The updated cache, and the states and the mask to attend with.
        """
        length = states.shape[1]
        cache = self._written(states, 0 if mask.offset is None else mask.offset)
        if mask.offset is None:
            return cache, states, mask.over(range(length))
        if length == 1:
            return cache, cache.read(states.dtype), mask
        # Several new tokens see one another as they are, behind what was there before.
        before = self.read(states.dtype)
        places = jnp.arange(before.shape[1], dtype=jnp.int32)
        new = mask.offset + jnp.arange(length, dtype=jnp.int32)
        slots = jnp.concatenate([jnp.where(places < mask.offset, places, -1), new])
        return cache, jnp.concatenate([before, states], axis=1), mask.over(slots, own=length)

    def read(self, dtype: Any) -> jax.Array:
        """Return what is kept as numbers, `[batch, max_length, 1, latent_rank + rotary_dim]`."""
        parts = [read(part, dtype) for part in self.parts]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def grow(self, max_length: int) -> Self:
        """Return the cache with room for `max_length` positions."""
        return type(self)(tuple(padded(part, max_length) for part in self.parts))

    def crop(self, length: int, index: int) -> Self:
        """Return the cache without the slots from `length` on, of `index` written: they are written over later."""
        del length, index
        return self

    def shift(self, by: Any) -> Self:
        """Return the cache with all that it holds `by` slots further right, int32 `[]`; negative: left."""
        return type(self)(tuple(rolled(part, by) for part in self.parts))

    def _written(self, states: jax.Array, index: Any) -> Self:
        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, (0, index, 0, 0))

        new = [states] if len(self.parts) == 1 else jnp.split(states, [self.parts[0].shape[-1]], axis=-1)
        return type(self)(tuple(updated(part, x, write) for part, x in zip(self.parts, new, strict=True)))
