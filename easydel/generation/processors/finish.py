"""Scores made finite or normalised, and the caller's own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RemoveInvalid:
    """Replaces nan by 0 and infinities by the largest and smallest finite numbers."""

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, finite."""
        del written
        return jnp.nan_to_num(scores, nan=0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Renormalize:
    """Makes scores logarithms of probabilities again."""

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, normalised."""
        del written
        return jax.nn.log_softmax(scores, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Own:
    """The caller's function `(input_ids, scores) -> scores` (static: another function is another program).

    It gets the tokens so far at the right end of int32 `[rows, capacity]`, `NO_TOKEN` before the first, and the scores.
    """

    function: Callable[[jax.Array, jax.Array], Any] = field(metadata={"static": True})

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return what the function makes of the scores `[rows, vocab]`.

        Raises:
            ValueError: it gives something of another shape.
        """
        given = self.function(written.last(written.tokens.shape[1]), scores)
        if getattr(given, "shape", None) != scores.shape:
            name = getattr(self.function, "__name__", type(self.function).__name__)
            got = getattr(given, "shape", type(given).__name__)
            raise ValueError(f"logits_processor {name} must return scores of shape {scores.shape}, got {got}")
        return given.astype(scores.dtype)
