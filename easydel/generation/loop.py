"""The compiled loop: a prompt into the cache, then token after token without leaving the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.generation.search import Progress, Search, advance, begin
from easydel.generation.written import Written, begin_after
from easydel.structure import Structure

NextLogits = Callable[[Progress], tuple[jax.Array, Any]]
"""From where a generation stands to logits `[rows, vocab]` and what the model keeps."""


def run(next_logits: NextLogits, progress: Progress, search: Search, limit: jax.Array) -> Progress:
    """Go on until `limit` tokens are made or every row has ended."""

    def body(progress: Progress) -> Progress:
        return advance(progress, *next_logits(progress), search)

    return jax.lax.while_loop(lambda p: (p.written.step < limit) & ~p.finished.all(), body, progress)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Feed:
    """Prompts as they are run, piece by piece.

    Attributes:
        ids: int32 `[rows, slots]`: what is run, from the first column on; padding before a row's first.
        first: int32 `[rows]`, the column of a row's first token.
        counts: int32 `[sizes]`, pieces of each size.
        tokens: int32 `[rows, slots]`, whole prompts, those of a cache included, all ending at one column.
        length: int32 `[]`, that column.
        starts: int32 `[rows]`, the column in which each of them begins.
    """

    ids: Any
    first: Any
    counts: Any
    tokens: Any
    length: Any
    starts: Any

    def written(self, pad_token_id: Any) -> Written:
        """Return the prompts with nothing added yet."""
        inside = jnp.arange(self.tokens.shape[1])
        inside = (inside >= self.starts[:, None]) & (inside < self.length)
        tokens = jnp.where(inside, self.tokens, pad_token_id)
        return Written(tokens, self.starts, jnp.asarray(self.length), jnp.zeros((), jnp.int32))


@dataclass(frozen=True)
class CachedLoop:
    """The programs of a model that takes a cache, for one length and dtype of the cache.

    Attributes:
        graphdef: of the model.
        max_length: slots of the cache.
        cache_dtype: `"int8"`, or `None`: the model's.
        records: steps that scores or logits are recorded for, if they are.
    """

    graphdef: Any
    max_length: int
    cache_dtype: str | None
    records: int

    @functools.cached_property
    def prefill(self) -> Any:
        """Compiled `(params, other, ids, mask, context, live, seed, search) -> Progress` with the first token.

        The whole prompt at once: for models that are given a context, which their first call alone takes.
        """
        return jax.jit(self._prefill)

    @functools.cached_property
    def prefill_in_pieces(self) -> Any:
        """Compiled `(sizes, params, other, feed, cache, live, seed, search) -> Progress` with the first token.

        `sizes` of the pieces are static; how many there are of each is not. Without a `cache` one is made.
        """
        return jax.jit(self._prefill_in_pieces, static_argnums=0)

    @functools.cached_property
    def read(self) -> Any:
        """Compiled `(sizes, params, other, feed, cache) -> (logits [rows, vocab], cache)` after the prompts."""
        return jax.jit(self._read, static_argnums=0)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, progress, search, limit) -> Progress`; the progress given is used up."""
        return jax.jit(self._decode, donate_argnums=2)

    def empty(self, model: Any, rows: int) -> Any:
        """Return a cache with nothing written, marked as it is later on: a loop's state has one structure."""
        return replace(model.init_operations_cache(rows, self.max_length, dtype=self.cache_dtype), is_empty=False)

    def _prefill(
        self,
        params: Any,
        other: Any,
        ids: jax.Array,
        mask: jax.Array,
        context: dict[str, jax.Array],
        live: jax.Array,
        seed: jax.Array,
        search: Search,
    ) -> Progress:
        model = nnx.merge(self.graphdef, params, other)
        batch, width = ids.shape
        cache = model.init_operations_cache(batch, width, dtype=self.cache_dtype)
        # The prompt attends to itself alone: the cache gets its full length afterwards.
        logits, cache = next_logits_of(model, ids, mask, cache, **context)
        written = begin_after(ids, mask, self.max_length, search.pad_token_id)
        return begin(logits, cache.grow(self.max_length), written, live, seed, search, self.records)

    def _prefill_in_pieces(
        self,
        sizes: tuple[int, ...],
        params: Any,
        other: Any,
        feed: Feed,
        cache: Any,
        live: jax.Array,
        seed: jax.Array,
        search: Search,
    ) -> Progress:
        logits, cache = self._read(sizes, params, other, feed, cache)
        return begin(logits, cache, feed.written(search.pad_token_id), live, seed, search, self.records)

    def _read(self, sizes: tuple[int, ...], params: Any, other: Any, feed: Feed, cache: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(self.graphdef, params, other)
        rows = feed.ids.shape[0]
        cache = self.empty(model, rows) if cache is None else replace(cache, is_empty=False)

        def run_piece(size: int, state: Any) -> Any:
            at, _, cache = state
            ids = jax.lax.dynamic_slice_in_dim(feed.ids, at, size, axis=1)
            # The first of them follow padding, or what the cache holds of the row.
            mask = at + jnp.arange(size) >= feed.first[:, None]
            logits, cache = next_logits_of(model, ids, mask, cache)
            return at + size, logits, cache

        start = jnp.zeros((), jnp.int32)
        shape = jax.eval_shape(lambda: run_piece(sizes[-1], (start, None, cache)))[1]
        state: Any = (start, jnp.zeros(shape.shape, shape.dtype), cache)
        for place, size in enumerate(sizes):
            step = functools.partial(_counted, functools.partial(run_piece, size))
            state = jax.lax.fori_loop(0, feed.counts[place], step, state)
        return state[1:]

    def _decode(self, params: Any, other: Any, progress: Progress, search: Search, limit: jax.Array) -> Progress:
        model = nnx.merge(self.graphdef, params, other)

        def next_logits(progress: Progress) -> tuple[jax.Array, Any]:
            written = progress.written
            current = jax.lax.dynamic_slice_in_dim(written.tokens, written.length - 1, 1, axis=1)
            return next_logits_of(model, current, None, progress.memory)

        return run(next_logits, progress, search, limit)


def next_logits_of(
    model: Any, ids: jax.Array, mask: jax.Array | None, cache: Any, **context: Any
) -> tuple[jax.Array, Any]:
    """Return the logits `[rows, vocab]` after the last of new tokens, and the updated cache."""
    if hasattr(model, "next_token_logits"):
        return model.next_token_logits(ids, mask, cache, **context)
    out = model(input_ids=ids, attention_mask=mask, cache=cache, **context)
    return out.logits[:, -1], out.cache


def _counted(step: Callable[[Any], Any], place: jax.Array, state: Any) -> Any:
    del place
    return step(state)


@functools.lru_cache(maxsize=32)
def cached_loop(structure: Structure, max_length: int, cache_dtype: str | None = None, records: int = 0) -> CachedLoop:
    """Return the programs for a model's structure and `max_length` slots of the cache; equal models share them."""
    return CachedLoop(structure.graphdef, max_length, cache_dtype, records)
