"""`easydel generate`: continue a prompt on the terminal."""

from __future__ import annotations

import sys

from easydel.assets import embedded_model_path
from easydel.cli.text import load_model, load_tokenizer, stream_text


def run_generate(
    *,
    model: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    dtype: str,
) -> None:
    """Write the prompt and its continuation to standard output, piece by piece."""
    source = model or str(embedded_model_path())
    network, tokenizer = load_model(source, dtype), load_tokenizer(source)
    options = sampling_options(temperature, top_p, top_k) | {"max_new_tokens": max_new_tokens, "seed": seed}
    sys.stdout.write(prompt)
    for piece in stream_text(network, tokenizer, prompt, **options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def sampling_options(temperature: float, top_p: float, top_k: int) -> dict[str, float | int | bool]:
    """Return the options of `model.generate`; temperature 0 is greedy search, which has no other knobs."""
    if temperature == 0:
        return {"do_sample": False}
    options: dict[str, float | int | bool] = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return options | ({"top_k": top_k} if top_k else {})
