"""Models with their tokenizers: load both, and turn a prompt into text as it is made."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydel.hub.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["encode_text", "load_model", "load_tokenizer", "stream_pieces", "stream_text"]

DTYPES = ("float32", "bfloat16", "float16")


def load_model(source: str | Path, dtype: str = "float32", quantization: str | None = None) -> Any:
    """Load a causal language model that computes in, and holds its parameters in, `dtype`.

    Args:
        source: folder or Hub id.
        dtype: one of `DTYPES`.
        quantization: method by which linear layers are quantized as they are read.

    Raises:
        ValueError: an unknown dtype or method, or the checkpoint does not load.
    """
    import jax.numpy as jnp

    from easydel import AutoEasyDeLModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return AutoEasyDeLModelForCausalLM.from_pretrained(source, dtype=jnp.dtype(dtype), quantization_method=quantization)


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Return the tokens of a (long) text without special tokens, int32 [n]."""
    import numpy as np

    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)


def stream_text(model: Any, tokenizer: Any, prompt: str, **options: Any) -> Generator[str]:
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
    return stream_pieces(model, tokenizer, input_ids, **options)


def stream_pieces(model: Any, tokenizer: Any, input_ids: np.ndarray, **options: Any) -> Generator[str]:
    """Do what `stream_text` does, from the prompt's tokens, int32 `[1, n]`."""
    from easydel.generation.text_pieces import text_of

    return text_of(model.stream(input_ids=input_ids, **options), tokenizer)
