"""What a batch is, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from easydel.calls import forward_parameters

Batch = dict[str, np.ndarray]
IGNORED = -100
_CAUSAL_TASKS = ("causal-lm", "base")


def check_batch_fits(model: Any, keys: Iterable[str]) -> None:
    """Raise if a model cannot be trained on batches with these keys.

    An argument that a forward pass would swallow in its `**kwargs` counts as not taken: `segment_ids` that are not
    heeded would let packed documents see each other.

    Args:
        model: a model or its class.
        keys: those of a batch, such as `batch.keys()`.

    Raises:
        ValueError: the model is no causal language model, or its forward pass does not name one of the keys.
    """
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    if model.model_task not in _CAUSAL_TASKS:
        raise ValueError(
            f"these batches are for causal language models (the label of a token is the token), {name} is made for "
            f"{model.model_task}: use a causal-lm model, or make batches of your own"
        )
    taken = {*forward_parameters(model), "labels"}
    missing = [key for key in keys if key not in taken]
    if "segment_ids" in missing:
        raise ValueError(
            f"{name}'s forward pass takes no segment_ids, so packed documents would see each other: use "
            "DataConfig(packing=False), or give its __call__ the argument and heed it"
        )
    if missing:
        raise ValueError(f"{name}'s forward pass takes no {', '.join(missing)}; it takes {', '.join(sorted(taken))}")
