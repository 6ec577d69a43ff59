"""Rows that are decoded together and replaced one by one: the compiled side of `generate_many`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import Cache
from easydel.generation.loop import CachedLoop, cached_loop, next_logits_of
from easydel.generation.processors import apply
from easydel.generation.search import Search, draw
from easydel.generation.written import Written
from easydel.structure import Structure


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seats:
    """Answers in the making, one a row, each begun when its row became free.

    All rows write at one slot of the cache. A prompt that takes a row is moved so that it ends there: what stands
    before it is masked, and its positions are its own. A short prompt is read there, a token a step, beside the others'
    answers: a step costs the same whatever a row's token is for.

    Attributes:
        cache: of all rows.
        answers: int32 `[rows, capacity]`.
        made: int32 `[rows]`, tokens of the answers.
        limits: int32 `[rows]`, most tokens.
        live: bool `[rows]`, which rows go on.
        keys: random keys `[rows]`.
        prompts: int32 `[rows, rows]`, short prompts, each of which ends at the last column.
        unread: int32 `[rows]`, tokens of them that are still to be read.
    """

    cache: Cache
    answers: jax.Array
    made: jax.Array
    limits: jax.Array
    live: jax.Array
    keys: jax.Array
    prompts: jax.Array
    unread: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """What each row reads next, int32 `[rows, 1]`: of its prompt, or the last of its answer."""
        asked = jnp.take_along_axis(self.prompts, -self.unread[:, None], axis=1)  # counted from the end
        last = jnp.take_along_axis(self.answers, jnp.maximum(self.made - 1, 0)[:, None], axis=1)
        return jnp.where(self.unread[:, None] > 0, asked, last)

    def append(self, logits: jax.Array, row: jax.Array | None, search: Search) -> Seats:
        """Return the seats after the next token of the live rows whose prompts are read.

        Args:
            logits: `[rows, vocab]`, or `[1, vocab]` of one row.
            row: int32 `[]`, that row; `None`: all.
            search: how to choose.
        """
        rows = jnp.arange(len(self.made)) if row is None else row[None]
        made, keys, live = self.made[rows], self.keys[rows], self.live[rows]
        answering = live & (self.unread[rows] == 0)
        # The processors that are let in look at scores only.
        scores = apply(search.processors, _nothing_written(len(rows)), logits.astype(jnp.float32))
        chosen = draw(scores, keys, made) if search.do_sample else scores.argmax(axis=-1).astype(jnp.int32)
        chosen = jnp.where(answering, chosen, search.pad_token_id)
        ended, _ = search.stopping.ends(chosen, None, lambda: _nothing_written(len(rows)), lambda: scores)
        places = jnp.where(answering, made, self.answers.shape[1])  # of rows that answer nothing: nowhere
        made = made + answering
        return replace(
            self,
            answers=self.answers.at[rows, places].set(chosen, mode="drop"),
            made=self.made.at[rows].set(made),
            live=self.live.at[rows].set(live & ~(answering & (ended | (made >= self.limits[rows])))),
        )


def _nothing_written(rows: int) -> Written:
    zero = jnp.zeros((), jnp.int32)
    return Written(jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows,), jnp.int32), zero, zero)


@dataclass(frozen=True)
class SeatLoop:
    """The programs of a model, a number of rows, a length of the cache and a longest answer.

    Attributes:
        loop: reads prompts, one at a time.
        rows: that are decoded together.
        capacity: tokens of the longest answer.
    """

    loop: CachedLoop
    rows: int
    capacity: int

    @functools.cached_property
    def start(self) -> Any:
        """Compiled `(params, other, index) -> Seats`, all free; the first prompts will end at slot `index`."""
        return jax.jit(self._start)

    @functools.cached_property
    def take(self) -> Any:
        """Compiled `(seats, row, logits, cache, limit, seed, search) -> Seats` with a prompt and its first token."""
        return jax.jit(self._take, donate_argnums=0)

    @functools.cached_property
    def feed(self) -> Any:
        """Compiled `(params, other, seats, row, prompt, length, limit, seed) -> Seats` with a prompt to be read.

        `prompt` is int32 `[rows]`, its tokens to the right.
        """
        return jax.jit(self._feed, donate_argnums=2)

    @functools.cached_property
    def shift(self) -> Any:
        """Compiled `(seats, by) -> Seats` with the caches moved `by` slots to the right."""
        return jax.jit(lambda seats, by: replace(seats, cache=seats.cache.shift(by)), donate_argnums=0)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, seats, search, steps) -> (Seats, steps made)`.

        It ends after `steps`, or when one more row has ended.
        """
        return jax.jit(self._decode, donate_argnums=2)

    def _start(self, params: Any, other: Any, index: jax.Array) -> Seats:
        cache = self.loop.empty(nnx.merge(self.loop.graphdef, params, other), self.rows)
        none = jnp.zeros((self.rows,), jnp.int32)
        return Seats(
            cache=replace(cache, index=jnp.asarray(index, jnp.int32)),
            answers=jnp.zeros((self.rows, self.capacity), jnp.int32),
            made=none,
            limits=none,
            live=jnp.zeros((self.rows,), bool),
            keys=jax.random.split(jax.random.key(0), self.rows),
            prompts=jnp.zeros((self.rows, self.rows), jnp.int32),
            unread=none,
        )

    def _take(
        self, seats: Seats, row: Any, logits: jax.Array, cache: Cache, limit: Any, seed: Any, search: Search
    ) -> Seats:
        return _occupied(seats, row, cache, limit, seed).append(logits, jnp.asarray(row), search)

    def _feed(
        self, params: Any, other: Any, seats: Seats, row: Any, prompt: Any, length: Any, limit: Any, seed: Any
    ) -> Seats:
        cache = self.loop.empty(nnx.merge(self.loop.graphdef, params, other), 1)
        seats = _occupied(seats, row, cache, limit, seed)
        return replace(seats, prompts=seats.prompts.at[row].set(prompt), unread=seats.unread.at[row].set(length))

    def _decode(self, params: Any, other: Any, seats: Seats, search: Search, steps: Any) -> tuple[Seats, jax.Array]:
        model = nnx.merge(self.loop.graphdef, params, other)
        begun = seats.live.sum()

        def goes_on(state: tuple[Seats, jax.Array]) -> jax.Array:
            seats, made = state
            return (made < steps) & (seats.live.sum() == begun) & (begun > 0)

        def step(state: tuple[Seats, jax.Array]) -> tuple[Seats, jax.Array]:
            seats, made = state
            logits, cache = next_logits_of(model, seats.tokens, None, seats.cache)
            unread = jnp.maximum(seats.unread - 1, 0)
            return replace(seats, cache=cache, unread=unread).append(logits, None, search), made + 1

        return jax.lax.while_loop(goes_on, step, (seats, jnp.zeros((), jnp.int32)))


def _occupied(seats: Seats, row: Any, cache: Cache, limit: Any, seed: Any) -> Seats:
    """Return the seats with what a cache of one row holds, nothing answered yet."""
    moved = cache.shift(seats.cache.index - cache.index)
    return replace(
        seats,
        cache=seats.cache.insert(moved, row),
        made=seats.made.at[row].set(0),
        limits=seats.limits.at[row].set(limit),
        live=seats.live.at[row].set(True),
        keys=seats.keys.at[row].set(jax.random.split(jax.random.key(seed), 1)[0]),
        unread=seats.unread.at[row].set(0),
    )


@functools.lru_cache(maxsize=32)
def seat_loop(structure: Structure, slots: int, cache_dtype: str | None, rows: int, capacity: int) -> SeatLoop:
    """Return the programs for a model's structure; equal models share them."""
    return SeatLoop(cached_loop(structure, slots, cache_dtype), rows, capacity)
