"""Prompts laid out for their pieces, and a cache in hand that holds what they begin with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from easydel.caching import Cache, SlidingCache
from easydel.distributed import whole
from easydel.errors import UnsupportedError
from easydel.generation.loop import Feed
from easydel.generation.prompts import Pieces, align


def fitting(cache: Cache, model: Any, prompt: Any, options: Any) -> Cache:
    """Return a cache that prompts go on from, with a row for each of them.

    Args:
        cache: of one row, for all prompts, or of as many as there are.
        model: that made it.
        prompt: `easydel.generation.engine.Prompt`, whole: it begins with the tokens that the cache holds.
        options: resolved.

    Raises:
        UnsupportedError: the model takes no cache, or keeps an encoder's states in it.
        ValueError: it is no cache, its rows are others, it holds more than a prompt, or nothing, or its dtype differs.
    """
    if not getattr(model, "takes_cache", False) or prompt.context:
        raise UnsupportedError(f"cache= is not supported by {type(model).__name__}: its prompts are run as a whole")
    if not isinstance(cache, Cache):
        raise ValueError(f"cache must be an easydel.caching.Cache, as the forward pass returns it; got {type(cache)}")
    if options.cache_dtype is not None:
        raise ValueError("cache= says itself how keys and values are kept: leave out cache_implementation")
    if cache.is_empty:
        raise ValueError("the cache holds nothing yet: run the prompt's beginning with it, or leave out cache=")
    rows, batch = cache.batch_size, len(prompt.ids)
    if rows not in (1, batch):
        raise ValueError(f"the cache has {rows} rows, input_ids have {batch}: it must have as many, or one for all")
    cache = cache.repeat(batch) if rows == 1 and batch > 1 else cache
    seen, tokens = whole(cache.seen), prompt.mask.sum(axis=1)
    if (seen >= tokens).any():
        row = int(np.argmax(seen >= tokens))
        raise ValueError(
            f"the cache holds {seen[row]} tokens of row {row}, its prompt has {tokens[row]}: input_ids are the whole "
            "prompt, the cached beginning included, and at least one token more; crop the cache if it holds too much"
        )
    return cache


def feed_of(ids: np.ndarray, mask: np.ndarray, more: int, cache: Cache | None) -> tuple[Pieces, Feed]:
    """Return the pieces in which prompts are run and the prompts so laid out.

    Args:
        ids: int32 `[rows, seq]`, whole prompts.
        mask: bool `[rows, seq]`.
        more: slots needed behind them.
        cache: that holds what they begin with.

    Raises:
        ValueError: padding would stand between what a window looks back at.
    """
    counts = mask.sum(axis=1).astype(np.int32)
    seen = np.zeros_like(counts) if cache is None else whole(cache.seen)
    rest, index = counts - seen, 0 if cache is None else int(cache.index)
    exact = cache is not None and _has_window(cache)
    if exact and len(set(rest.tolist())) > 1:
        raise ValueError(
            f"after what the cache holds, {rest.tolist()} tokens of each row are left: a model with sliding windows "
            "needs equal numbers, as padding between would push tokens out of its windows; generate them one by one"
        )
    pieces = Pieces.plan(int(rest.max()), more, index, exact=exact)
    return pieces, _laid_out(pieces, ids, mask, counts, rest, index)


def feed_within(tokens: np.ndarray, slots: int) -> tuple[Pieces, Feed]:
    """Return the pieces of one prompt, int32 `[seq]`, for a cache of so many slots, and the prompt so laid out."""
    pieces = Pieces.within(slots, len(tokens), slots)
    count = np.asarray([len(tokens)], np.int32)
    return pieces, _laid_out(pieces, tokens[None], np.ones((1, len(tokens)), bool), count, count, 0)


def _laid_out(
    pieces: Pieces, ids: np.ndarray, mask: np.ndarray, counts: np.ndarray, rest: np.ndarray, index: int
) -> Feed:
    length = index + pieces.width
    tokens = align(ids, mask, length, left=True)[0]
    room = np.zeros((len(ids), pieces.slots), np.int32)
    whole, run = room.copy(), room
    whole[:, :length] = tokens
    run[:, : pieces.width] = tokens[:, index:]
    first, sizes = (pieces.width - rest).astype(np.int32), np.asarray(pieces.counts, np.int32)
    return Feed(run, first, sizes, whole, np.int32(length), (length - counts).astype(np.int32))


def grown(cache: Cache, slots: int) -> Cache:
    """Return the cache with so many slots, or more if it has them."""
    return cache if cache.max_length is None or cache.max_length >= slots else _grown(cache, slots)


_grown = jax.jit(Cache.grow, static_argnums=1)


def _has_window(cache: Cache) -> bool:
    """Whether a layer looks back at a number of slots, so that empty ones between count."""

    def is_ring(node: Any) -> bool:
        return isinstance(node, SlidingCache)

    return any(map(is_ring, jax.tree.leaves(cache.layers, is_leaf=is_ring)))
