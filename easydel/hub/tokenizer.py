"""The tokenizer beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """Load the tokenizer beside a checkpoint.

    Args:
        source: directory or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no tokenizer could be loaded from there ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
