"""The tokens that both models are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from easydel.infra.registry import TaskType

LENGTH = 16


def random_inputs(model: Any, *, batch: int | None, length: int | None, seed: int) -> dict[str, np.ndarray]:
    """Return the arguments of a forward pass: random tokens, and the end of the last row of several is padding.

    Tokens that mean padding, a beginning or an end are not among them.

    Args:
        model: what they are for.
        batch: how many rows; `None`: 2, or 1 if a classifier of sequences has no token for padding.
        length: tokens of a row; `None`: 16, or as many as the model takes if those are fewer.
        seed: the same gives the same tokens.

    Returns:
        Name → int32 `[batch, length]`.

    Raises:
        ValueError: fewer than 1 of either, or more rows than the model takes.
    """
    config = model.config
    pad = getattr(config, "pad_token_id", None)
    one_row = pad is None and model.model_task == TaskType.SEQUENCE_CLASSIFICATION
    batch = (1 if one_row else 2) if batch is None else batch
    if one_row and batch > 1:
        raise ValueError(f"batch={batch}: without a pad_token_id in its config a classifier is compared on one row")
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH) if length is None else length
    if batch < 1 or length < 1:
        raise ValueError(f"batch={batch} and length={length} must be 1 or more")
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    known = {token for value in special for token in (value if isinstance(value, list) else [value])}
    tokens = np.array([token for token in range(config.vocab_size) if token not in known], np.int32)
    ids = np.random.default_rng(seed).choice(tokens, (batch, length))
    mask = np.ones_like(ids)
    if batch > 1:
        mask[-1, length - length // 4 :] = 0
        ids = np.where(mask == 1, ids, np.int32(pad or 0))
    return _arguments(model, ids, mask)


def text_inputs(model: Any, tokenizer: Any, text: str) -> dict[str, np.ndarray]:
    """Return the arguments of a forward pass over a text, one row without padding.

    Raises:
        ValueError: the text has no tokens.
    """
    ids = np.array([tokenizer.encode(text)], np.int32).reshape(1, -1)
    if not ids.size:
        raise ValueError("the text is empty, and the tokenizer adds no token of its own")
    return _arguments(model, ids, np.ones_like(ids))


def _arguments(model: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not getattr(model.config, "is_encoder_decoder", False):
        return inputs
    target = ids.copy()  # other tokens than the encoder's, padded where those are
    for row, kept in zip(target, mask == 1, strict=True):
        row[kept] = row[kept][::-1]
    return inputs | {"decoder_input_ids": target, "decoder_attention_mask": mask}
