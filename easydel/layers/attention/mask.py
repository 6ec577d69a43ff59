"""Who may attend to whom, kept as its parts so that whole blocks can be left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """A mask by slots: places in the sequence, padding included.

    Attributes:
        key_valid: bool `[batch, keys]`, which keys hold a token; `None`: all.
        offset: int32 `[]`, the slot of the first query; `None`: 0, and known at trace time.
        key_slots: int32 `[keys]`, the slot of each key (negative: none); `None`: its place.
        query_segments: int `[batch, queries]`; tokens see only their own segment.
        key_segments: int `[batch, keys]`.
        own: how many keys at the end are those of the queries, one for each; 0: none are set apart (static).
        causal: whether a query sees no later slot (static).
        window: how many slots a query sees, itself included, backwards and, if not causal, as many forwards; `None`:
            all (static).
    """

    key_valid: jax.Array | None = None
    offset: jax.Array | None = None
    key_slots: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    own: int = field(default=0, metadata={"static": True})
    causal: bool = field(default=True, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})

    def with_window(self, window: int | None) -> AttentionMask:
        """Return the mask with another window."""
        return replace(self, window=window)

    def over(self, slots: range | jax.Array, own: int = 0) -> AttentionMask:
        """Return the mask for keys that are some of the slots this mask is about, in this order.

        Args:
            slots: the first ones (a range from 0), or int32 `[keys]`, negative where a key is none.
            own: how many of them at the end are those of the queries; those before come from the first places of a
                cache on.
        """
        if isinstance(slots, range):
            return replace(self, key_valid=None if self.key_valid is None else self.key_valid[:, : slots.stop])
        holds = (slots >= 0)[None]
        if self.key_valid is not None:
            holds &= jnp.take(self.key_valid, jnp.maximum(slots, 0), axis=1, mode="clip")
        return replace(self, key_valid=holds, key_slots=slots, own=own)

    def cut(self, start: Any, size: int, keys: int) -> AttentionMask:
        """Return the mask for `size` of its `keys` from `start` on, which may be known at run time only."""

        def part(x: jax.Array | None, axis: int) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        slots = jnp.arange(keys, dtype=jnp.int32) if self.key_slots is None else self.key_slots
        valid, segments = part(self.key_valid, 1), part(self.key_segments, 1)
        return replace(self, key_slots=part(slots, 0), key_valid=valid, key_segments=segments)

    def distances(self, queries: range, keys: range) -> jax.Array:
        """Return how many slots each key lies before each query, int32 `[queries, keys]`; negative: after it."""
        first = 0 if self.offset is None else self.offset
        query_slots = first + jnp.arange(queries.start, queries.stop, dtype=jnp.int32)
        if self.key_slots is None:
            key_slots = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)
        else:
            key_slots = self.key_slots[keys.start : keys.stop]
        return query_slots[:, None] - key_slots[None, :]

    def visible(self, queries: range, keys: range) -> jax.Array | None:
        """Return a block of the mask, bool `[batch or 1, 1, queries, keys]`; `None`: all visible."""
        parts = []
        if self.causal or self.window is not None:
            distances = self.distances(queries, keys)
            if self.causal:
                parts.append((distances >= 0)[None, None])
            if self.window is not None:
                apart = distances if self.causal else jnp.abs(distances)
                parts.append((apart < self.window)[None, None])
        if self.key_valid is not None:
            parts.append(self.key_valid[:, None, None, keys.start : keys.stop])
        if self.query_segments is not None and self.key_segments is not None:
            query = self.query_segments[:, queries.start : queries.stop]
            key = self.key_segments[:, keys.start : keys.stop]
            parts.append((query[:, :, None] == key[:, None, :])[:, None])
        if not parts:
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        return mask

    def key_range(self, queries: range, keys: int) -> range:
        """Return the keys that a block of queries can see at all, as far as that is known at trace time."""
        if self.offset is not None or self.key_slots is not None:
            return range(keys)
        ahead = keys if self.window is None else self.window - 1
        stop = min(keys, queries.stop + (0 if self.causal else ahead))
        start = 0 if self.window is None else max(0, queries.start - self.window + 1)
        return range(min(start, max(stop - 1, 0)), stop)
