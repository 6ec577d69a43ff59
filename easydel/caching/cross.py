"""What a decoder keeps of an encoder's states, and a decoder block's whole cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossAttentionCache:
    """One cross-attention layer's keys and values; nothing (`None`) until the first call has computed them.

    Attributes:
        key: `[batch, source, kv_heads, head_dim]`.
        value: likewise.
        valid: bool `[batch, source]`, which places hold a token; `None`: all.
    """

    key: jax.Array | None = None
    value: jax.Array | None = None
    valid: jax.Array | None = None

    def grow(self, max_length: int) -> Self:
        """Return the cache as it is: the encoder's states do not get more."""
        del max_length
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
