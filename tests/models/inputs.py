"""What models are given: padded rows, and labels for each task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

MASKED = -100  # a label that does not count


def pad(rows: list[np.ndarray], width: int, *, left: bool, token: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask, `[batch, width]`, of rows of different lengths."""
    ids, mask = np.full((len(rows), width), token, np.int32), np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def int32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def as_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        tensor = torch.from_numpy(np.array(value))
        return tensor if tensor.is_floating_point() else tensor.long()

    return {k: convert(v) if isinstance(v, np.ndarray | jax.Array) else v for k, v in inputs.items()}


def given(task: str, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
    """Return the inputs of a task's forward pass."""
    masks = {} if mask is None else {"attention_mask": mask}
    if task != "seq2seq":
        return {"input_ids": ids, **masks}
    target, kept = ids.copy(), np.ones_like(ids, bool) if mask is None else mask == 1
    for row, keep in zip(target, kept, strict=True):  # other tokens than the encoder's, padded where those are
        row[keep] = row[keep][::-1]
    return {"input_ids": ids, "decoder_input_ids": target, **masks, **{f"decoder_{k}": v for k, v in masks.items()}}


def continuing(task: str, ids: np.ndarray, mask: Any = None, *, first: bool = True) -> dict[str, Any]:
    """Return the inputs of a forward pass that adds tokens to a cache: the decoder's, where there is an encoder.

    Args:
        task: the model's.
        ids: the new tokens.
        mask: theirs, or of all so far.
        first: whether the cache is empty (or there is none), so that the encoder is needed.
    """
    masks = {} if mask is None else {"attention_mask": mask}
    if task != "seq2seq":
        return {"input_ids": ids, **masks}
    source = np.random.default_rng(5).integers(4, 90, (len(ids), 9)).astype(np.int32)
    kept = (np.arange(9) < 9 - 3 * (np.arange(len(ids)) % 2)[:, None]).astype(np.int32)
    encoder = {"input_ids": source, "attention_mask": kept} if first else {}
    return {"decoder_input_ids": ids, **{f"decoder_{k}": v for k, v in masks.items()}, **encoder}


def labels(task: str, ids: np.ndarray, mask: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Return the labels of a task, some of them masked where a task has one for each token."""
    masked = (mask == 0) | (np.random.default_rng(2).random(ids.shape) < 0.2)
    first, last = mask.argmax(axis=1), ids.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    made = {
        "causal-lm": {"labels": np.where(masked, MASKED, ids)},
        "masked-lm": {"labels": np.where(masked, MASKED, ids)},
        "seq2seq": {"labels": np.where(masked, MASKED, ids)},
        "token-classification": {"labels": np.where(masked, MASKED, ids % classes)},
        "sequence-classification": {"labels": ids.sum(axis=1) % classes},
        "question-answering": {"start_positions": first, "end_positions": last},
    }[task]
    return {name: values.astype(np.int32) for name, values in made.items()}
