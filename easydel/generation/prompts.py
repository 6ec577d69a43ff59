"""Prompts on the host: checked, padded to few lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

SHORTEST_PROMPT = 32
SHORTEST_CACHE = 128


def bucket(length: int, shortest: int) -> int:
    """Return the next power of two, at least `shortest`: few lengths mean few compilations."""
    return max(shortest, 1 << (length - 1).bit_length())


def check_prompt(input_ids: Any, attention_mask: Any, vocab_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, int32 `[batch, seq]`, and mask, bool `[batch, seq]`.

    Raises:
        ValueError: wrong shapes or types, ids outside the vocabulary, or a row without any token.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers [batch, seq], not empty; got {ids.dtype}{list(ids.shape)}")
    if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got [{ids.min()}, {ids.max()}]")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
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
