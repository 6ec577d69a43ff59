"""No sequence of n tokens twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from easydel.generation.processors.ids import ban, occurring
from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoRepeatNgram:
    """Bans tokens that would complete `size` tokens that the prompt or the answer holds already.

    Attributes:
        size: of the n-grams (static).
    """

    size: int = field(metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for banned tokens."""
        return ban(_completing(written.tokens, written.is_token, written, self.size, scores.shape[1]), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoRepeatSourceNgram:
    """Bans tokens that would complete `size` tokens of what is answered to (`encoder_no_repeat_ngram_size`).

    Attributes:
        source: int32 `[rows, n]`, `NO_TOKEN` where one is padding.
        size: of the n-grams (static).
    """

    source: Any
    size: int = field(metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for banned tokens."""
        source = jnp.asarray(self.source)
        return ban(_completing(source, source >= 0, written, self.size, scores.shape[1]), scores)


def _completing(tokens: jax.Array, is_token: jax.Array, written: Written, size: int, vocab: int) -> jax.Array:
    """Return bool `[rows, vocab]`: which tokens follow, in `tokens`, what each row ends with."""
    width = tokens.shape[1]
    if width < size:
        return jnp.zeros((tokens.shape[0], vocab), bool)
    prefix = written.last(size - 1)
    starts = width - size + 1
    matches = jnp.ones((tokens.shape[0], starts), bool)
    for place in range(size):
        there = slice(place, place + starts)
        matches &= is_token[:, there]
        if place < size - 1:
            matches &= tokens[:, there] == prefix[:, place, None]
    return occurring(tokens[:, size - 1 :], matches, vocab)
