"""Models with their tokenizers: load both, and turn a prompt into text as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydel.hub.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["encode_text", "load_model", "load_tokenizer", "stream_text"]

DTYPES = ("float32", "bfloat16", "float16")


def load_model(source: str | Path, dtype: str = "float32") -> Any:
    """Load a causal language model that computes in, and holds its parameters in, `dtype`.

    Raises:
        ValueError: an unknown dtype, or the checkpoint does not load.
    """
    import jax.numpy as jnp

    from easydel import AutoEasyDeLModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return AutoEasyDeLModelForCausalLM.from_pretrained(source, dtype=jnp.dtype(dtype))


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Return the tokens of a (long) text without special tokens, int32 [n]."""
    import numpy as np

    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)


def stream_text(model: Any, tokenizer: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Yield the continuation of a prompt, a piece for each token (which may be empty) and a last one.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to go on from.
        **options: as `model.generate` takes them.
    """
    import numpy as np

    input_ids = np.array([tokenizer.encode(prompt)], np.int32)
    if not input_ids.size:
        raise ValueError("the prompt is empty and the tokenizer adds no begin token: give a prompt")
    made: list[int] = []
    shown = ""
    for chunk in model.stream(input_ids=input_ids, **options):
        made.extend(int(token) for token in np.asarray(chunk).reshape(-1))
        text = tokenizer.decode(made, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # a character whose last bytes are still to come
            text = shown
        yield text[len(shown) :]
        shown = text
    yield tokenizer.decode(made, skip_special_tokens=True)[len(shown) :]
