"""Tokens while they are made: how often the compiled loop is looked at, and streamers of transformers' protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from easydel.distributed import broadcast, whole
from easydel.generation.options import GenerationOptions
from easydel.generation.search import Progress

# Runs until `limit` tokens are made or every row has ended; the second argument is whether the last of them is the end.
Advance = Callable[[int, bool], Progress]

MOST_TOGETHER = 32
"""Tokens that the loop makes at most before it is looked at again."""
SOON, LATE = 0.025, 0.1
"""Seconds between looks: sooner than the one twice as many tokens are made, later than the other half as many. A reader
does not see steps of that size, and a look costs far less."""


def looks(advance: Advance, options: GenerationOptions, started: float) -> Iterator[Progress]:
    """Run the loop a few tokens at a time, and yield where it stands each time.

    What was yielded is used up by the next step. Between two looks nothing is under way.

    Args:
        advance: makes tokens.
        options: what was asked for. With a `max_time` the clock is looked at before each token.
        started: when the call began, on the monotonic clock.
    """
    made, together, late = 0, 1, False
    while not late:
        made = min(made + together, options.max_new_tokens)
        began = time.monotonic()
        late = made == options.max_new_tokens
        if options.max_time is not None:  # of one clock for all processes
            late |= broadcast(began - started > options.max_time)
        progress = advance(made, late)
        late |= bool(whole(progress.finished).all())
        if options.max_time is None and not late:
            together = broadcast(_pace(together, time.monotonic() - began))
        yield progress


def _pace(together: int, seconds: float) -> int:
    if seconds < SOON:
        return min(2 * together, MOST_TOGETHER)
    return max(together // 2, 1) if seconds > LATE else together


def settled(looks: Iterator[Progress], rows: int) -> Iterator[tuple[Progress, np.ndarray]]:
    """Add to each look what was made since the one before: int32 `[steps, rows]` on the host, of the first `rows`."""
    seen = 0
    for progress in looks:
        written = progress.written
        length, step = jax.device_get((written.length, written.step))
        tokens = whole(written.tokens)
        yield progress, np.ascontiguousarray(tokens[:rows, length - (step - seen) : length].T)
        seen = step


def steps_of(looks: Iterator[Progress], rows: int) -> Generator[np.ndarray]:
    """Yield the tokens of each step, int32 `[rows]`."""
    for _, steps in settled(looks, rows):
        yield from steps


def feed(streamer: Any, prompt: np.ndarray, looks: Iterator[Progress], rows: int) -> Progress:
    """Give a streamer the prompt, int32 `[batch, seq]`, and the tokens of each step, int32 `[rows]`; return the end."""
    streamer.put(prompt)
    for progress, steps in settled(looks, rows):  # noqa: B007 (the last one is returned)
        for tokens in steps:
            streamer.put(tokens)
    streamer.end()
    return progress


def finish(looks: Iterator[Progress]) -> Progress:
    """Return the last look."""
    for progress in looks:  # noqa: B007
        pass
    return progress


def check_streamer(streamer: Any, options: GenerationOptions) -> None:
    """Refuse what is no streamer, and beams, whose tokens are not settled before the end.

    Raises:
        ValueError: either.
    """
    missing = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
    if missing:
        raise ValueError(
            f"streamer must have put(tokens) and end(), as transformers' TextStreamer has; "
            f"{type(streamer).__name__} has no {' and no '.join(missing)}"
        )
    if options.num_beams > 1:
        raise ValueError(
            f"a streamer is given tokens that are settled, those of num_beams={options.num_beams} are only at the end: "
            "leave one of the two out"
        )


def check_stream(tokenizer: Any, options: GenerationOptions, rows: int) -> None:
    """Refuse what cannot be streamed.

    Args:
        tokenizer: for text, or `None`.
        options: what was asked for.
        rows: answers to all prompts.

    Raises:
        ValueError: something that is not settled before the end, text of several answers, or no tokenizer.
    """
    for name, off in (("num_beams", 1), ("output_scores", False), ("output_logits", False)):
        if getattr(options, name) != off:
            raise ValueError(f"stream() yields tokens that are settled: it takes no {name}={getattr(options, name)}")
    if tokenizer is None:
        return
    if not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(f"tokenizer must be one of transformers (with decode()), got {type(tokenizer).__name__}")
    if rows > 1:
        raise ValueError(
            f"stream() yields the text of one answer, here there are {rows}: give one prompt, or leave the tokenizer "
            "out for the token ids of all rows (with stop strings: generate() with a streamer)"
        )
