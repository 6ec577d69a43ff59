"""`generate_many`: any number of prompts through a fixed number of rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from easydel.calls import takes
from easydel.distributed import is_first, whole
from easydel.errors import UnsupportedError
from easydel.generation.engine import prepare
from easydel.generation.options import GenerationOptions
from easydel.generation.prefix import feed_within
from easydel.generation.prompts import SHORTEST_CACHE, bucket
from easydel.generation.search import Search
from easydel.generation.seats import SeatLoop, Seats, seat_loop
from easydel.structure import split_again

STEPS = 32
"""Most tokens between two looks at which rows have ended."""
SPARE_SLOTS = 96
"""Slots beyond those that the longest answer needs: each time they are used up, the cache is copied once.

They also hold what a prompt's last small piece (of at most 64) has beyond the prompt.
"""

# What does without an account of each row's tokens; anything else is refused by name.
_OFFERED = {
    *("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "suppress_tokens", "remove_invalid_values", "renormalize_logits", "eos_token_ids", "pad_token_id"),
    *("seed", "cache_dtype"),
}


def generate_many(model: Any, prompts: Sequence[Any], *, progress: bool = False, **options: Any) -> list[np.ndarray]:
    """Continue many prompts; see `EasyGenerationMixin.generate_many`."""
    answers: list[Any] = [None] * len(prompts)
    found = iterate_many(model, prompts, **options)
    if progress and is_first():
        from tqdm import tqdm

        found = tqdm(found, total=len(prompts), unit="answer")
    for place, tokens in found:
        answers[place] = tokens
    return answers


def iterate_many(
    model: Any, prompts: Sequence[Any], *, batch_size: int = 16, **options: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Continue many prompts and yield each answer as it ends; see `EasyGenerationMixin.iterate_many`."""
    _check_model(model)
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise ValueError(f"batch_size must be an integer, at least 1, got {batch_size!r}")
    if not len(prompts):
        return iter(())
    requests = _requests(model, prompts, options)
    return _run(model, requests, min(int(batch_size), len(requests)))


@dataclass(frozen=True)
class Request:
    """One prompt: its tokens, int32 `[seq]`, and its options."""

    tokens: np.ndarray
    options: GenerationOptions

    @property
    def span(self) -> int:
        """The tokens of the prompt and the longest answer."""
        return len(self.tokens) + self.options.max_new_tokens


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not getattr(model, "can_generate", True):
        raise UnsupportedError(f"generate_many() is not supported by {name}: it predicts no next token")
    if hasattr(model, "generation_inputs"):
        raise UnsupportedError(f"generate_many() is not supported by {name}, which has an encoder: use generate()")
    if not takes(model, "cache"):
        raise UnsupportedError(f"generate_many() is not supported by {name}, which takes no cache: use generate()")


def _requests(model: Any, prompts: Sequence[Any], options: dict[str, Any]) -> list[Request]:
    """Return prompts with their options, all checked before anything runs."""
    limits = _each("max_new_tokens", options.pop("max_new_tokens", None), len(prompts))
    seeds = _each("seed", options.pop("seed", None), len(prompts), counting=True)
    made = []
    for place, prompt in enumerate(prompts):
        given = options | {"max_new_tokens": limits[place], "seed": seeds[place]}
        try:
            checked, resolved = prepare(model, np.asarray(prompt)[None], None, given)
        except UnsupportedError:  # of the options, which are for all
            raise
        except ValueError as error:
            raise ValueError(f"prompt {place}: {error}") from error
        _refuse(resolved)
        made.append(Request(checked.ids[0], resolved))
    return made


def _each(name: str, value: Any, count: int, *, counting: bool = False) -> list[Any]:
    """Return an option for each prompt; one number is for all, or (`counting`) for the first of consecutive ones."""
    if isinstance(value, Sequence | np.ndarray):
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} numbers, there are {count} prompts")
        return list(value)
    return [(value or 0) + place if counting else value for place in range(count)]


def _refuse(options: GenerationOptions) -> None:
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in _OFFERED and value != field.default:
            raise UnsupportedError(
                f"generate_many() takes no {field.name}={value!r}: rows begin at different times, and it looks back at "
                f"them; use generate() (offered: {', '.join(sorted(_OFFERED))})"
            )


def _run(model: Any, requests: list[Request], rows: int) -> Iterator[tuple[int, np.ndarray]]:
    structure, params, other = split_again(model)
    options = requests[0].options
    longest = max(len(request.tokens) for request in requests)
    needed = max(request.span for request in requests) + SPARE_SLOTS
    slots = bucket(needed, SHORTEST_CACHE)
    capacity = bucket(max(request.options.max_new_tokens for request in requests), 64)
    loop = seat_loop(structure, slots, options.cache_dtype, rows, capacity)
    search = _search(model, options)
    seats = loop.start(params, other, np.int32(longest))
    # Those that may take longest first, lest one of them is left alone at the end.
    order = sorted(range(len(requests)), key=lambda place: -requests[place].options.max_new_tokens)
    waiting, taken = deque(order), dict.fromkeys(range(rows), -1)
    made, unread, index = np.zeros(rows, np.int32), np.zeros(rows, np.int32), longest
    while waiting or any(place >= 0 for place in taken.values()):
        for row, place in taken.items():
            if place < 0 and waiting:
                taken[row] = waiting.popleft()
                seats, unread[row] = _seated(loop, params, other, seats, row, requests[taken[row]], search)
                made[row] = unread[row] == 0  # a prompt that is read already brings the first token
        if index + STEPS > slots and seats.cache.max_length is not None:
            spans = [len(requests[place].tokens) + made[row] for row, place in taken.items() if place >= 0]
            least = max(longest, *spans)
            seats, index = loop.shift(seats, np.int32(least - index)), least
        left = [
            requests[place].options.max_new_tokens - made[row] + max(unread[row] - 1, 0)
            for row, place in taken.items()
            if place >= 0
        ]
        most = min(STEPS, *left) if waiting else STEPS  # until the first row is known to end, if it is waited for
        seats, steps = loop.decode(params, other, seats, search, np.int32(most))
        index, made, live = index + int(steps), np.array(whole(seats.made)), whole(seats.live)
        unread = np.maximum(unread - int(steps), 0)
        ended = [row for row, place in taken.items() if place >= 0 and not live[row]]
        answers = np.array(whole(seats.answers)) if ended else None
        for row in ended:
            place, taken[row] = taken[row], -1
            assert answers is not None
            yield place, answers[row, : made[row]]


def _seated(
    loop: SeatLoop, params: Any, other: Any, seats: Seats, row: int, request: Request, search: Search
) -> tuple[Seats, int]:
    """Give a prompt a row, read already or to be read there; also return how many of its tokens are still to be read.

    Read by itself a prompt takes about the time of a step, of all rows; read there, a share of so many steps.
    """
    limit, seed = np.int32(request.options.max_new_tokens), np.uint32(request.options.seed)
    length = len(request.tokens)
    if length <= loop.rows:
        prompt = np.zeros(loop.rows, np.int32)
        prompt[-length:] = request.tokens
        return loop.feed(params, other, seats, np.int32(row), prompt, np.int32(length), limit, seed), length
    pieces, feed = feed_within(request.tokens, loop.loop.max_length)
    logits, cache = loop.loop.read(pieces.sizes, params, other, feed, None)
    return loop.take(seats, np.int32(row), logits, cache, limit, seed, search), 0


def _search(model: Any, options: GenerationOptions) -> Search:
    one = np.zeros((1, 1), np.int32)
    options = replace(options, seed=0)
    return Search.create(options, one, np.ones((1, 1), bool), getattr(model.config, "vocab_size", None), None)
