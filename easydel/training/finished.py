"""What a run leaves when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easydel.distributed import by_first
from easydel.infra.adapter_files import base_of


def save_trained(model: Any, directory: Path, tokenizer: Any = None) -> None:
    """Write a trained model and its tokenizer; of a model with adapters, these alone, as PEFT does.

    If the adapters' base was loaded from nowhere, it would be lost: then they are folded into it, and the whole model
    is written.

    Args:
        model: the model; it may be used up: of one with adapters, these may be gone from it afterwards.
        directory: where.
        tokenizer: of transformers.
    """
    if model.lora_is_enabled and base_of(model)[0] is not None:
        model.save_adapter(directory)
    else:
        if model.lora_is_enabled:
            model.merge_and_unload()
        model.save_pretrained(directory)
    if tokenizer is not None:

        def write() -> None:
            tokenizer.save_pretrained(directory)

        by_first(write)
