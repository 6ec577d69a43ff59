"""What a decoder keeps of an encoder's states, and a decoder block's whole cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax

from easydel.caching.quantized import States, quantized, read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossAttentionCache:
    """One cross-attention layer's keys and values; nothing (`None`) until the first call has computed them.

    Attributes:
        key: `[batch, source, kv_heads, head_dim]`, numbers or `QuantizedStates`.
        value: likewise.
        valid: bool `[batch, source]`, which places hold a token; `None`: all.
        is_quantized: whether keys and values are kept as int8 (static).
    """

    key: States | None = None
    value: States | None = None
    valid: jax.Array | None = None
    is_quantized: bool = field(default=False, metadata={"static": True})

    def filled(self, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> Self:
        """Return the cache with what the first call has computed."""
        states = (quantized(key), quantized(value)) if self.is_quantized else (key, value)
        return replace(self, key=states[0], value=states[1], valid=valid)

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array] | None:
        """Return keys and values to compute with; `None`: there are none yet."""
        if self.key is None or self.value is None:
            return None
        return read(self.key, dtype), read(self.value, dtype)

    def grow(self, max_length: int) -> Self:
        """Return the cache as it is: the encoder's states do not get more."""
        del max_length
        return self

    def crop(self, length: int, index: int) -> Self:
        """Return the cache as it is: the encoder's states are not the decoder's slots."""
        del length, index
        return self

    def shift(self, by: Any) -> Self:
        """Return the cache as it is."""
        del by
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderDecoderCache:
    """The cache of a decoder block: of its attention to earlier tokens, and of its attention to the encoder.

    Attributes:
        own: of the self-attention, with `grow`.
        cross: of the cross-attention.
    """

    own: Any
    cross: CrossAttentionCache

    @property
    def keeps_slots(self) -> bool:
        """Whether single slots are looked back at."""
        return getattr(self.own, "keeps_slots", True)

    def grow(self, max_length: int) -> Self:
        """Return the cache with room for `max_length` positions."""
        return replace(self, own=self.own.grow(max_length))

    def crop(self, length: int, index: int) -> Self:
        """Return the cache without the decoder's slots from `length` on, of `index` written."""
        return replace(self, own=self.own.crop(length, index))

    def shift(self, by: Any) -> Self:
        """Return the cache with the decoder's slots `by` further right."""
        return replace(self, own=self.own.shift(by))
