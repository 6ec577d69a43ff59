"""Tokens that are never written, or not at the beginning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from easydel.generation.processors.ids import among, ban
from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SuppressTokens:
    """Bans some tokens: `ids`, int32 `[n]`, padded with `NO_TOKEN`."""

    ids: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for banned tokens."""
        del written
        return ban(among(self.ids, scores.shape[1]), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeginSuppressTokens:
    """Bans some tokens as the first that is free.

    Attributes:
        ids: int32 `[n]`, padded with `NO_TOKEN`.
        after_bos: whether the token after a prompt of one is forced, so that the next is the first free one (static).
    """

    ids: Any
    after_bos: bool = field(metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for banned tokens."""
        one = written.counts - written.step == 1
        begins = written.step == (one.astype(int) if self.after_bos else 0)
        return ban(begins.reshape(-1, 1) & among(self.ids, scores.shape[1]), scores)
