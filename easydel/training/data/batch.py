"""What a batch is, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from easydel.calls import forward_parameters
from easydel.infra.forward import check_length, check_token_range

Batch = dict[str, np.ndarray]
IGNORED = -100
_CAUSAL_TASKS = ("causal-lm", "base")


def check_batch_fits(model: Any, batch: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise if a model cannot be trained on a batch.

    An argument that a forward pass would swallow in its `**kwargs` counts as not taken: `segment_ids` that are not
    heeded would let packed documents see each other.

    Args:
        model: a model or its class.
        batch: a batch, or its keys alone. Of a batch, the length of its rows and its tokens are checked too, if `model`
            is no class: what lies outside a table of positions or of the vocabulary would be looked up as NaN.

    Raises:
        ValueError: the model is no causal language model, its forward pass does not name one of the keys, or rows or
            tokens are beyond it.
    """
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    if model.model_task not in _CAUSAL_TASKS:
        raise ValueError(
            f"these batches are for causal language models (the label of a token is the token), {name} is made for "
            f"{model.model_task}: use a causal-lm model, or make batches of your own"
        )
    taken = {*forward_parameters(model), "labels"}
    missing = [key for key in batch if key not in taken]
    if "segment_ids" in missing:
        raise ValueError(
            f"{name}'s forward pass takes no segment_ids, so packed documents would see each other: use "
            "DataConfig(packing=False), or give its __call__ the argument and heed it"
        )
    if missing:
        raise ValueError(f"{name}'s forward pass takes no {', '.join(missing)}; it takes {', '.join(sorted(taken))}")
    if isinstance(batch, Mapping) and not isinstance(model, type):
        # Of packed rows too: a single document may fill one.
        check_length(model, batch["input_ids"].shape[1])
        check_token_range(batch["input_ids"], getattr(model.config, "vocab_size", None))
