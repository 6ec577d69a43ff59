"""How the next token is chosen: the likeliest or a draw; beams are in `easydel.generation.beams`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.beams import Beams, Hypotheses
from easydel.generation.options import GenerationOptions
from easydel.generation.processors import Processor, apply, processors_of
from easydel.generation.stopping import Stopping
from easydel.generation.written import NO_TOKEN, Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Search:
    """All that is done with logits. Numbers are traced: changing them compiles nothing anew.

    Attributes:
        processors: what is made of scores, in order.
        stopping: when a row ends.
        watched: the stop strings' automaton's states after the prompts, int32 `[batch]`; `None`: no strings.
        beams: of beam search; `None`: each row goes its own way.
        pad_token_id: int32 `[]`.
        max_new_tokens: int32 `[]`.
        do_sample: draw, or take the likeliest (static).
        answers: rows for each prompt, where they are no beams (static).
        keep_scores: whether each step's scores are recorded (static).
        keep_logits: whether each step's logits are (static).
    """

    processors: tuple[Processor, ...]
    stopping: Stopping
    watched: Any
    beams: Beams | None
    pad_token_id: Any
    max_new_tokens: Any
    do_sample: bool = field(metadata={"static": True})
    answers: int = field(metadata={"static": True})
    keep_scores: bool = field(metadata={"static": True})
    keep_logits: bool = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        options: GenerationOptions,
        ids: np.ndarray,
        mask: np.ndarray,
        vocab_size: int | None,
        source: np.ndarray | None,
    ) -> Self:
        """Make the search of some options.

        Args:
            options: resolved.
            ids: the prompts, int32 `[batch, seq]`.
            mask: bool `[batch, seq]`, false where one is padding.
            vocab_size: of the model, as far as it is known.
            source: what is answered to, int32 `[batch, n]`, `NO_TOKEN` where one is padding; `None`: unknown.
        """
        beams = Beams.create(options) if options.num_beams > 1 else None
        answers = 1 if beams else options.num_return_sequences
        rows = answers * (beams.width if beams else 1)
        stopping, watched = Stopping.create(options, ids, mask, vocab_size)
        return cls(
            processors=processors_of(options, None if source is None else np.repeat(source, rows, axis=0)),
            stopping=stopping,
            watched=watched,
            beams=beams,
            pad_token_id=np.int32(options.pad_token_id),
            max_new_tokens=np.int32(options.max_new_tokens),
            do_sample=options.do_sample,
            answers=answers,
            keep_scores=options.output_scores,
            keep_logits=options.output_logits,
        )

    @property
    def rows(self) -> int:
        """How many rows each prompt becomes."""
        return self.answers * (self.beams.width if self.beams else 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where a generation stands.

    Attributes:
        memory: what the model needs to go on: a cache, or nothing where it reads all that is written.
        written: the tokens of each row.
        finished: bool `[rows]`; of beam search `[batch]`.
        keys: random keys, one for each row; of beam search for each prompt.
        watched: states of the stop strings' automaton, int32 `[rows]`, or `None`.
        hypotheses: of beam search, else `None`.
        scores: float32 `[steps, rows, vocab]`, what tokens were chosen from, or `None`.
        logits: likewise, what the model said.
    """

    memory: Any
    written: Written
    finished: jax.Array
    keys: jax.Array
    watched: Any
    hypotheses: Hypotheses | None
    scores: jax.Array | None
    logits: jax.Array | None


def begin(
    logits: jax.Array, memory: Any, written: Written, live: Any, seed: Any, search: Search, records: int
) -> Progress:
    """Make the first token (or beams) after prompts.

    Args:
        logits: `[batch, vocab]`.
        memory: after the prompts; `None`: none is kept.
        written: the prompts.
        live: bool `[batch]`, which of them are wanted; the others, made up, end at once.
        seed: of the draws, uint32 `[]`.
        search: how to choose.
        records: steps that scores and logits are recorded for.
    """
    batch, vocab = logits.shape
    rows = jnp.repeat(jnp.arange(batch), search.rows)
    if search.rows > 1:
        logits, written = logits[rows], written.reorder(rows)
        memory = None if memory is None else memory.reorder(rows)
    drawing = batch if search.beams else len(rows)
    record = jnp.zeros((records, len(rows), vocab), jnp.float32)
    progress = Progress(
        memory=None,
        written=written,
        finished=~(jnp.asarray(live) if search.beams else jnp.asarray(live)[rows]),
        keys=jax.random.split(jax.random.key(seed), drawing),
        watched=None if search.watched is None else jnp.asarray(search.watched)[rows],
        hypotheses=search.beams.begin(batch, written) if search.beams else None,
        scores=record if search.keep_scores else None,
        logits=record if search.keep_logits else None,
    )
    return advance(progress, logits, memory, search)


def advance(progress: Progress, logits: jax.Array, memory: Any, search: Search) -> Progress:
    """Choose the next tokens from logits `[rows, vocab]`; `memory` is what the model kept when it made them."""
    logits = logits.astype(jnp.float32)
    start = jax.nn.log_softmax(logits, axis=-1) if search.beams else logits
    scores = apply(search.processors, progress.written, start)
    step = progress.written.step
    progress = replace(
        progress,
        memory=memory,
        scores=None if progress.scores is None else progress.scores.at[step].set(scores),
        logits=None if progress.logits is None else progress.logits.at[step].set(logits),
    )
    return _one_by_one(progress, scores, search) if search.beams is None else _by_beams(progress, scores, search)


def _one_by_one(progress: Progress, scores: jax.Array, search: Search) -> Progress:
    """Choose a token for each row; those that have ended get padding."""
    if search.do_sample:
        chosen = draw(scores, progress.keys, progress.written.step)
    else:
        chosen = scores.argmax(axis=-1).astype(jnp.int32)
    chosen = jnp.where(progress.finished, search.pad_token_id, chosen)
    written = progress.written.append(chosen)
    ended, watched = search.stopping.ends(chosen, progress.watched, lambda: written, lambda: scores)
    return replace(progress, written=written, watched=watched, finished=progress.finished | ended)


def _by_beams(progress: Progress, scores: jax.Array, search: Search) -> Progress:
    assert search.beams is not None
    assert progress.hypotheses is not None
    turn = search.beams.advance(
        progress.hypotheses,
        progress.written,
        scores,
        keys=progress.keys if search.do_sample else None,
        ended=lambda *given: search.stopping.ends(*given),
        watched=progress.watched,
        finished=progress.finished,
        max_new_tokens=search.max_new_tokens,
    )
    memory = None if progress.memory is None else progress.memory.reorder(turn.rows)
    return replace(
        progress,
        memory=memory,
        written=turn.written,
        watched=turn.watched,
        hypotheses=turn.hypotheses,
        finished=turn.finished,
    )


def draw(scores: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    """Draw a token for each row from scores `[rows, vocab]`: int32 `[rows]`.

    Each row has a key of its own, `[rows]`: its draws do not depend on its neighbours. `step`, int32 `[]` or `[rows]`,
    counts them.
    """
    one = jax.vmap(lambda key, step, row: jax.random.categorical(jax.random.fold_in(key, step), row))
    return one(keys, jnp.broadcast_to(step, keys.shape), scores).astype(jnp.int32)


def source_of(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return prompts with `NO_TOKEN` for their padding, int32 `[batch, n]`."""
    return np.where(mask, ids, NO_TOKEN).astype(np.int32)
