"""Beam search: the likeliest continuations of several unfinished answers, side by side.

Beams of one prompt are neighbouring rows of one batch, `[batch · width]`; which row goes on from which is a gather of
all that is kept of a row. What is kept when, and when a search ends, is as in transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.options import GenerationOptions
from easydel.generation.written import Written

_NEVER = -1e9
"""The score of what there is not yet, or no more; finite, so that differences of such scores are."""

Ended = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Unfinished answers' scores and the best finished answers.

    Attributes:
        running: float32 `[batch, width]`, the sum of the scores of each unfinished answer.
        paths: int32 `[batch · width, capacity]`: for each new token of an unfinished answer the row it was chosen in.
        scores: float32 `[batch, width]`, of the finished answers, best first, lengths taken into account.
        done: bool `[batch, width]`: whether there is a finished answer there yet.
        tokens: int32 `[batch, width, capacity]`, prompt and answer.
        done_paths: int32 `[batch, width, capacity]`, as `paths`; -1 after an answer's end.
    """

    running: jax.Array
    paths: jax.Array
    scores: jax.Array
    done: jax.Array
    tokens: jax.Array
    done_paths: jax.Array


@dataclass(frozen=True)
class Turn:
    """What one step of beam search gives.

    Attributes:
        rows: int32 `[batch · width]`: the row that each row goes on from.
        written: the unfinished answers, with their new tokens.
        watched: states of the stop strings' automaton, or `None`.
        hypotheses: brought up to date.
        finished: bool `[batch]`.
    """

    rows: jax.Array
    written: Written
    watched: Any
    hypotheses: Hypotheses
    finished: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """How a beam search goes.

    Attributes:
        length_penalty: float32 `[]`: a finished answer's score is divided by its length to this power.
        width: beams for each prompt (static).
        candidates: continuations looked at in each step (static): enough to leave `width` that do not end.
        early_stopping: `True`, `False` or `"never"` (static).
    """

    length_penalty: Any
    width: int = field(metadata={"static": True})
    candidates: int = field(metadata={"static": True})
    early_stopping: bool | str = field(metadata={"static": True})

    @classmethod
    def create(cls, options: GenerationOptions) -> Self:
        """Make the beam search of some options."""
        return cls(
            length_penalty=np.float32(options.length_penalty),
            width=options.num_beams,
            candidates=max(2, 1 + len(options.eos_token_ids)) * options.num_beams,
            early_stopping=options.early_stopping,
        )

    def begin(self, batch: int, written: Written) -> Hypotheses:
        """Make the state before the first token; all beams are the same then, so that only the first counts."""
        capacity = written.tokens.shape[1]
        first = jnp.arange(self.width) == 0
        return Hypotheses(
            running=jnp.broadcast_to(jnp.where(first, 0.0, _NEVER), (batch, self.width)).astype(jnp.float32),
            paths=jnp.full((batch * self.width, capacity), -1, jnp.int32),
            scores=jnp.full((batch, self.width), _NEVER, jnp.float32),
            done=jnp.zeros((batch, self.width), bool),
            tokens=written.tokens.reshape(batch, self.width, capacity),
            done_paths=jnp.full((batch, self.width, capacity), -1, jnp.int32),
        )

    def advance(
        self,
        hypotheses: Hypotheses,
        written: Written,
        scores: jax.Array,
        *,
        keys: jax.Array | None,
        ended: Ended,
        watched: Any,
        finished: jax.Array,
        max_new_tokens: jax.Array,
    ) -> Turn:
        """Go one token further.

        Args:
            hypotheses: so far.
            written: the unfinished answers, `[batch · width]` rows.
            scores: logarithms of probabilities, processed, float32 `[batch · width, vocab]`.
            keys: `[batch]`, to draw continuations with; `None`: the likeliest are taken.
            ended: `Stopping.ends`.
            watched: states of the stop strings' automaton, or `None`.
            finished: bool `[batch]`, prompts whose search is over: their answers do not change any more.
            max_new_tokens: int32 `[]`.

        Raises:
            ValueError: the vocabulary is too small for so many end-of-text tokens.
        """
        batch, vocab = hypotheses.running.shape[0], scores.shape[1]
        if self.candidates > self.width * vocab:
            raise ValueError(
                f"num_beams={self.width} looks at {self.candidates} continuations in each step (more with more "
                f"end-of-text tokens); a vocabulary of {vocab} has only {self.width * vocab}"
            )
        totals = (scores.reshape(batch, self.width, vocab) + hypotheses.running[:, :, None]).reshape(batch, -1)
        values, chosen = self._candidates(totals, keys, written.step)
        rows = (chosen // vocab + jnp.arange(batch)[:, None] * self.width).reshape(-1)  # [batch · candidates]
        tokens = (chosen % vocab).reshape(-1).astype(jnp.int32)
        longer = written.reorder(rows).append(tokens)
        paths = hypotheses.paths[rows].at[:, written.step].set(rows.astype(jnp.int32))
        watched = None if watched is None else watched[rows]
        over, watched = ended(tokens, watched, lambda: longer, lambda: scores[rows])
        over = over.reshape(batch, -1) | (written.step + 1 >= max_new_tokens)

        running, picked = jax.lax.top_k(jnp.where(over, values + _NEVER, values), self.width)
        picked_rows = (picked + jnp.arange(batch)[:, None] * self.candidates).reshape(-1)
        best = self._merge(hypotheses, over, values, longer, paths, finished)
        finished |= self._is_over(best, running, longer.step, max_new_tokens) | over.all(axis=1)
        return Turn(
            rows=rows[picked_rows],
            written=longer.reorder(picked_rows),
            watched=None if watched is None else watched[picked_rows],
            hypotheses=Hypotheses(running, paths[picked_rows], *best),
            finished=finished,
        )

    def _candidates(self, totals: jax.Array, keys: jax.Array | None, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the continuations to look at, best first: totals and places in `[batch, width · vocab]`."""
        if keys is None:
            return jax.lax.top_k(totals, self.candidates)
        # The largest of perturbed logarithms are draws without replacement: Vieira, "Gumbel-max trick and weighted
        # reservoir sampling", 2014; Kool et al., https://arxiv.org/abs/1903.06059.
        noise = jax.vmap(lambda key, row: jax.random.gumbel(jax.random.fold_in(key, step), row.shape))(keys, totals)
        _, drawn = jax.lax.top_k(totals + noise, self.candidates)
        values = jnp.take_along_axis(totals, drawn, axis=1)
        values, order = jax.lax.top_k(values, self.candidates)
        return values, jnp.take_along_axis(drawn, order, axis=1)

    def _merge(
        self,
        old: Hypotheses,
        over: jax.Array,
        values: jax.Array,
        longer: Written,
        paths: jax.Array,
        finished: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return the best finished answers: scores, done, tokens, paths. Only the best `width` candidates may end."""
        batch = len(values)
        new = over & (jnp.arange(self.candidates) < self.width)
        reached = values / jnp.power(longer.step.astype(jnp.float32), self.length_penalty)
        scores = jnp.concatenate([old.scores, jnp.where(new, reached, _NEVER)], axis=1)
        scores, picked = jax.lax.top_k(scores, self.width)

        def merged(kept: jax.Array, candidates: jax.Array) -> jax.Array:
            both = jnp.concatenate([kept, candidates.reshape(batch, self.candidates, *kept.shape[2:])], axis=1)
            taken = jnp.take_along_axis(both, picked.reshape(*picked.shape, *[1] * (kept.ndim - 2)), axis=1)
            return jnp.where(finished.reshape(batch, *[1] * (kept.ndim - 1)), kept, taken)

        return (
            jnp.where(finished[:, None], old.scores, scores),
            merged(old.done, new),
            merged(old.tokens, longer.tokens),
            merged(old.done_paths, paths),
        )

    def _is_over(
        self,
        best: tuple[jax.Array, ...],
        running: jax.Array,
        length: jax.Array,
        max_new_tokens: jax.Array,
    ) -> jax.Array:
        """Return bool `[batch]`: whether no unfinished answer is expected to get among the best."""
        scores, done = best[:2]
        # Where long answers are favoured the best conceivable one is as long as can be. Otherwise the present length
        # is taken: a heuristic unless length_penalty is 0.
        if self.early_stopping == "never":
            length = jnp.where(self.length_penalty > 0, max_new_tokens, length)
        reachable = running[:, 0] / jnp.power(length.astype(jnp.float32), self.length_penalty)
        # All answers must be there: one that is missing is worse than any.
        beaten = done.all(axis=1) & (reachable <= scores.min(axis=1))
        return beaten | done.all(axis=1) if self.early_stopping is True else beaten
