"""Prompts on the host: checked, padded to few lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from easydel.distributed import whole

SHORTEST_PROMPT = 32
SHORTEST_CACHE = 256
LONG_CACHE = 4096


@dataclass(frozen=True)
class Pieces:
    """How prompts are run: in pieces of few sizes, so that programs are shared by prompts of all lengths.

    Attributes:
        slots: of the cache.
        sizes: tokens of a piece, the largest first.
        counts: pieces of each size.
    """

    slots: int
    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens of all pieces, padding included."""
        return sum(size * count for size, count in zip(self.sizes, self.counts, strict=True))

    @classmethod
    def plan(cls, tokens: int, more: int, written: int = 0, *, exact: bool = False) -> Pieces:
        """Return the pieces for prompts of up to `tokens` tokens.

        Args:
            tokens: of the longest prompt, without what a cache holds of it.
            more: slots that are needed behind it.
            written: slots that a cache in hand has written.
            exact: no padding between: what no piece of the two sizes fills is run token by token.
        """
        slots = SHORTEST_CACHE
        while True:
            room = slots - written - more
            pieces = cls(slots, *_exact(tokens, _sizes(slots))) if exact else cls.within(slots, tokens, room)
            if pieces.width <= room:
                return pieces
            slots = larger_cache(slots)

    @classmethod
    def within(cls, slots: int, tokens: int, room: int) -> Pieces:
        """Return the pieces for prompts of up to `tokens` tokens in a cache of so many slots, `room` of them for those.

        More than half a large piece is run as a large one, where there is room for it.
        """
        large, small = _sizes(slots)
        whole, rest = divmod(tokens, large)
        if rest > large // 2 and (whole + 1) * large <= room:
            return cls(slots, (large, small), (whole + 1, 0))
        return cls(slots, (large, small), (whole, -(-rest // small)))


def _sizes(slots: int) -> tuple[int, int]:
    return (64, 16) if slots == SHORTEST_CACHE else (512, 64)


def _exact(tokens: int, sizes: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    large, rest = divmod(tokens, sizes[0])
    return (*sizes, 1), (large, *divmod(rest, sizes[1]))


def larger_cache(slots: int) -> int:
    """Return the next length of a cache: four times as long, where it is long twice."""
    return slots * 4 if slots < LONG_CACHE else slots * 2


def cache_slots(needed: int) -> int:
    """Return the length of a cache that has room for so many slots."""
    slots = SHORTEST_CACHE
    while slots < needed:
        slots = larger_cache(slots)
    return slots


def rows_for(rows: int) -> int:
    """Return the number of rows that are run for so many: a power of two, from eight on a multiple of eight."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def bucket(length: int, shortest: int) -> int:
    """Return the next power of two, at least `shortest`: few lengths mean few compilations."""
    return max(shortest, 1 << (length - 1).bit_length())


def check_prompt(input_ids: Any, attention_mask: Any, vocab_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, int32 `[batch, seq]`, and mask, bool `[batch, seq]`.

    Raises:
        ValueError: wrong shapes or types, ids outside the vocabulary, or a row without any token.
    """
    ids = whole(input_ids)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers [batch, seq], not empty; got {ids.dtype}{list(ids.shape)}")
    if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got [{ids.min()}, {ids.max()}]")
    mask = np.ones(ids.shape, bool) if attention_mask is None else whole(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}")
    if not mask.any(axis=1).all():
        raise ValueError(f"row {int(np.argmin(mask.any(axis=1)))} of attention_mask keeps no token")
    return ids.astype(np.int32), mask


def align(ids: np.ndarray, mask: np.ndarray, width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gather each row's tokens at one side of `width` columns.

    Args:
        ids: `[batch, seq]`, padded on any side.
        mask: bool `[batch, seq]`.
        width: columns of the result.
        left: padding goes to the left (tokens end at the last column), or to the right.
    """
    out = np.zeros((ids.shape[0], width), np.int32)
    kept = np.zeros((ids.shape[0], width), bool)
    for row, (tokens, keep) in enumerate(zip(ids, mask, strict=True)):
        count = int(keep.sum())
        place = slice(width - count, width) if left else slice(0, count)
        out[row, place], kept[row, place] = tokens[keep], True
    return out, kept
