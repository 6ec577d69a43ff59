"""From a finished run to the folder that the package carries: weights, validation text and model card."""

from __future__ import annotations

import platform
from pathlib import Path

import jax.numpy as jnp

from easydel import LlamaForCausalLM
from easydel.infra.base_state import EasyDeLState
from easydel.training import Perplexity, measure_perplexity
from scripts.train_embedded.corpus import Document
from scripts.train_embedded.train import Run, encode

EXCERPT = "functools.py"  # the validation document that travels with the model
CARD = Path(__file__).with_name("card.md")


def publish(run: Run, state: EasyDeLState, validation: list[Document], folder: Path) -> None:
    """Save the model in bfloat16, measure it *as saved*, and write its card.

    Raises:
        ValueError: the run is not finished; its card would not be true.
    """
    if int(state.step) != run.recipe.steps:
        raise ValueError(
            f"the run has done {int(state.step)} of {run.recipe.steps} steps; finish it, or pass its --steps"
        )
    state.model.to_dtype(jnp.bfloat16).save_pretrained(folder)
    excerpt = next(document for document in validation if document.name == EXCERPT)
    (folder / "validation.txt").write_text(excerpt.text, encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=jnp.float32)
    whole = measure_perplexity(model, run.held_out.eval_batches(8))
    windows = run.windows(encode(run.tokenizer, [excerpt]), run.recipe.length)
    part = measure_perplexity(model, windows.eval_batches(8))
    card = card_text(run, whole, part, validation, excerpt)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"validation perplexity {whole.per_token:.2f}, on {EXCERPT} {part.per_token:.2f}; written to {folder}")


def card_text(run: Run, whole: Perplexity, part: Perplexity, validation: list[Document], excerpt: Document) -> str:
    """Fill the card's template with what was measured."""
    recipe = run.recipe
    byte_count = sum(len(document.text.encode()) for document in validation)
    return CARD.read_text(encoding="utf-8").format(
        python=platform.python_version(),
        train_tokens=f"{len(run.train):,}",
        validation_tokens=f"{whole.tokens:,}",
        validation_documents=len(validation),
        perplexity=f"{whole.per_token:.2f}",
        bits=f"{whole.bits_per_byte(byte_count):.3f}",
        excerpt=EXCERPT,
        excerpt_tokens=f"{part.tokens:,}",
        excerpt_perplexity=f"{part.per_token:.3f}",
        excerpt_bits=f"{part.bits_per_byte(len(excerpt.text.encode())):.3f}",
        steps=f"{recipe.steps:,}",
        seen=f"{recipe.steps * recipe.tokens_per_step / 1e6:.1f}",
        passes=f"{recipe.steps * recipe.tokens_per_step / len(run.train):.1f}",
        tokens_per_step=f"{recipe.tokens_per_step:,}",
        length=recipe.length,
        long_length=recipe.long_length,
        peak_rate=recipe.peak_rate,
        warmup=recipe.warmup_steps,
        falling=round(100 * recipe.falling_share),
        minutes=f"{run.seconds / 60:.0f}",
    )
