"""What sampling changes of a distribution: temperature, and which tokens may be drawn at all.

Each keeps at least `least` tokens (static): one, or enough for beams to go on beside end-of-text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Temperature:
    """Divides scores by `temperature`, float32 `[]`."""

    temperature: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, divided."""
        del written
        return scores / self.temperature


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Keeps the `k` likeliest, int32 `[]`; ties with the k-th stay."""

    k: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        return jnp.where(scores < _ranked(scores, jnp.maximum(self.k, self.least)), -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopP:
    """Keeps the likeliest up to the one with which their probability reaches `p`, float32 `[]`.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019, https://arxiv.org/abs/1904.09751.
    """

    p: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        order = jnp.argsort(-scores, axis=-1)
        ranked = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked
        keep = (before < self.p) | (jnp.arange(scores.shape[-1]) < self.least)
        return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), scores, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MinP:
    """Keeps tokens at least `p` times as likely as the likeliest, float32 `[]`.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, https://arxiv.org/abs/2407.01082.
    """

    p: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        probabilities = jax.nn.softmax(scores, axis=-1)
        return _without(probabilities < self.p * probabilities.max(axis=-1, keepdims=True), scores, self.least)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Typical:
    """Keeps the tokens whose information is nearest to the entropy until their probability reaches `mass`.

    Source: Meister et al., "Locally Typical Sampling", 2022, https://arxiv.org/abs/2202.00666.
    """

    mass: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        vocab = scores.shape[-1]
        logs = jax.nn.log_softmax(scores, axis=-1)
        probabilities = jnp.exp(logs)
        distance = jnp.abs(-logs - _entropy(logs)[..., None])
        order = jnp.argsort(distance, axis=-1)
        reached = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1) < self.mass
        last = jnp.minimum(reached.sum(axis=-1, keepdims=True), vocab - 1)
        sorted_distance = jnp.take_along_axis(distance, order, axis=-1)
        drop = sorted_distance > jnp.take_along_axis(sorted_distance, last, axis=-1)
        drop &= jnp.arange(vocab) >= self.least
        return jnp.where(jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1), -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Epsilon:
    """Keeps tokens of probability `cutoff`, float32 `[]`, or more.

    Source: Hewitt et al., "Truncation Sampling as Language Model Desmoothing", 2022, https://arxiv.org/abs/2210.15191.
    """

    cutoff: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        return _without(jax.nn.softmax(scores, axis=-1) < self.cutoff, scores, self.least)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eta:
    """Keeps tokens of probability `min(cutoff, √cutoff · exp(-entropy))` or more; source as of `Epsilon`."""

    cutoff: Any
    least: int = field(default=1, metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for the others."""
        del written
        logs = jax.nn.log_softmax(scores, axis=-1)
        eta = jnp.minimum(self.cutoff, jnp.sqrt(self.cutoff) * jnp.exp(-_entropy(logs)))
        return _without(jnp.exp(logs) < eta[..., None], scores, self.least)


def _entropy(logs: jax.Array) -> jax.Array:
    return -jnp.where(jnp.isfinite(logs), jnp.exp(logs) * logs, 0.0).sum(axis=-1)


def _ranked(scores: jax.Array, rank: Any) -> jax.Array:
    """Return the `rank`-th largest score of each row, `[rows, 1]`."""
    vocab = scores.shape[-1]
    ascending = jnp.sort(scores, axis=-1)
    at = jnp.full((*scores.shape[:-1], 1), vocab - jnp.clip(rank, 1, vocab))
    return jnp.take_along_axis(ascending, at, axis=-1)


def _without(drop: jax.Array, scores: jax.Array, least: int) -> jax.Array:
    return jnp.where(drop & (scores < _ranked(scores, least)), -jnp.inf, scores)
