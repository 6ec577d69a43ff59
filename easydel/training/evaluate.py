"""Perplexity of a language model on a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easydel.infra.functional import bind, split
from easydel.training.data import IGNORED, Batch


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        nats: summed negative log-likelihood.
        tokens: how many tokens were predicted.
    """

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    def bits_per_byte(self, byte_count: int) -> float:
        """Return bits needed per byte of the text; comparable between tokenizers."""
        return self.nats / math.log(2) / byte_count


@functools.partial(jax.jit, static_argnames="graphdef")
def _mean_nats(graphdef: Any, params: Any, other: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return bind(graphdef, params, other)(**batch).loss


def measure_perplexity(model: Any, batches: Iterable[Batch]) -> Perplexity:
    """Measure a causal language model on batches of `input_ids` and `labels`, both int32 [batch, length].

    Labels are the tokens themselves (position i is predicted from those before it); `-100` is not counted.

    Raises:
        ValueError: no label counts.
    """
    graphdef, params, other = split(model)
    nats, tokens = 0.0, 0
    for batch in batches:
        if counted := int((batch["labels"][:, 1:] != IGNORED).sum()):
            arrays = {name: jnp.asarray(array) for name, array in batch.items()}
            nats += float(_mean_nats(graphdef, params, other, arrays)) * counted
            tokens += counted
    if tokens == 0:
        raise ValueError("perplexity needs at least one label that is not -100, got none; is the text empty?")
    return Perplexity(nats, tokens)
