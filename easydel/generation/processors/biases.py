"""Biases of tokens that would complete given sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.processors.ids import id_rows
from easydel.generation.written import NO_TOKEN, Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceBias:
    """Adds a bias to a token where it would complete a sequence; sequences of one token are always completed.

    A bias of -inf forbids the sequence: `bad_words_ids`.

    Attributes:
        sequences: int32 `[n, longest]`, each at the right end of its row, padded with `NO_TOKEN`.
        biases: float32 `[n]`.
    """

    sequences: Any
    biases: Any

    @classmethod
    def create(cls, biases: Mapping[tuple[int, ...], float]) -> Self:
        """Make it from sequence → bias."""
        sequences = id_rows(list(biases))
        values = np.zeros(len(sequences), np.float32)
        values[: len(biases)] = list(biases.values())
        return cls(sequences, values)

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]` with the biases."""
        vocab = scores.shape[1]
        prefixes, completing = jnp.asarray(self.sequences)[:, :-1], jnp.asarray(self.sequences)[:, -1]
        ends = written.last(prefixes.shape[1])
        matches = ((prefixes == NO_TOKEN) | (prefixes == ends[:, None])).all(axis=-1)
        tokens = jnp.where(completing == NO_TOKEN, vocab, completing)
        bias = jnp.zeros_like(scores).at[:, tokens].add(jnp.where(matches, self.biases, 0.0), mode="drop")
        return scores + bias
