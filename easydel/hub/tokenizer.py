"""The tokenizer beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer beside a checkpoint.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no tokenizer could be loaded from there ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
