"""What a run leaves when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_trained(model: Any, directory: Path, tokenizer: Any = None) -> None:
    """Write a trained model and its tokenizer; adapters are folded into the weights of the written model.

    Args:
        model: the model; it is used up: of one with adapters, these are gone from it afterwards.
        directory: where.
        tokenizer: of transformers.
    """
    if model.lora_is_enabled:
        model.merge_and_unload()
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
