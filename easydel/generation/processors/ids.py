"""Sets of token ids as arrays of few sizes, so that how many there are hardly ever costs a compilation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.written import NO_TOKEN

_SLOTS = 8


def id_set(ids: Iterable[int]) -> np.ndarray:
    """Return ids as int32 `[n]`, padded with `NO_TOKEN` to a multiple of eight."""
    ids = list(ids)
    out = np.full(_rounded(len(ids)), NO_TOKEN, np.int32)
    out[: len(ids)] = ids
    return out


def id_rows(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Return sequences of ids as int32 `[n, longest]`, each at the right end of its row, padded with `NO_TOKEN`.

    Both sizes are rounded up, to a multiple of eight and to a power of two.
    """
    longest = max((len(sequence) for sequence in sequences), default=1)
    out = np.full((_rounded(len(sequences)), 1 << (longest - 1).bit_length()), NO_TOKEN, np.int32)
    for row, sequence in zip(out, sequences, strict=False):
        row[len(row) - len(sequence) :] = sequence
    return out


def _rounded(count: int) -> int:
    return -(-max(count, 1) // _SLOTS) * _SLOTS


def among(ids: Any, vocab: int) -> jax.Array:
    """Return bool `[vocab]`: which tokens are in a set."""
    return jnp.zeros(vocab, bool).at[jnp.where(ids == NO_TOKEN, vocab, ids)].set(True, mode="drop")


def occurring(tokens: Any, where: Any, vocab: int) -> jax.Array:
    """Return bool `[rows, vocab]`: which tokens each row of `tokens` `[rows, n]` has where `where` is true."""
    return counted(tokens, where, vocab) > 0


def counted(tokens: Any, where: Any, vocab: int) -> jax.Array:
    """Return int32 `[rows, vocab]`: how often each token occurs in a row of `tokens` where `where` is true."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    places = jnp.where(where & (tokens >= 0), tokens, vocab)
    return jnp.zeros((tokens.shape[0], vocab), jnp.int32).at[rows, places].add(1, mode="drop")


def ban(banned: jax.Array, scores: jax.Array) -> jax.Array:
    """Set scores to -inf where `banned` is true."""
    return jnp.where(banned, -jnp.inf, scores)
