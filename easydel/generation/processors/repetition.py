"""Scores of tokens that occur already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from easydel.generation.processors.ids import counted, occurring
from easydel.generation.written import Written


def _scaled(scores: jax.Array, where: jax.Array, penalty: Any) -> jax.Array:
    return jnp.where(where, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens of the prompt or the answer: negative scores times `penalty`, positive ones divided by it.

    Source: Keskar et al., "CTRL", 2019, https://arxiv.org/abs/1909.05858, section 4.1.

    Attributes:
        penalty: float32 `[]`, positive; above 1 it discourages.
    """

    penalty: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]` with the penalty."""
        return _scaled(scores, occurring(written.tokens, written.is_token, scores.shape[1]), self.penalty)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SourceRepetitionPenalty:
    """Tokens of what is answered to, encouraged where `penalty` is above 1 (`encoder_repetition_penalty`).

    Attributes:
        penalty: float32 `[]`, positive.
        source: int32 `[rows, n]`, `NO_TOKEN` where one is padding.
    """

    penalty: Any
    source: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]` with the inverse penalty."""
        del written
        return _scaled(scores, occurring(self.source, True, scores.shape[1]), 1 / self.penalty)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CountPenalty:
    """`scores - count · frequency - [count > 0] · presence`, `count` the occurrences of a token in the answer so far.

    Source: OpenAI's API reference, "Frequency and presence penalties". transformers has no such options.

    Attributes:
        frequency: float32 `[]`.
        presence: float32 `[]`.
    """

    frequency: Any
    presence: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]` with the penalty."""
        counts = counted(written.tokens, written.is_new, scores.shape[1])
        return scores - counts * self.frequency - (counts > 0) * self.presence
