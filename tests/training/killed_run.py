"""`python -m tests.training.killed_run FOLDER CACHE`: the run that `test_kills.py` kills, over and over.

Text through grain, packed and shuffled; dropout, accumulation, evaluation, a checkpoint every other step. Each batch
that is begun is noted in a file before its step, so that none can be missed or seen twice unnoticed.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np

from easydel.assets import embedded_model_path, embedded_text_path
from easydel.hub.tokenizer import load_tokenizer
from easydel.training import DataConfig, Trainer
from tests.training.runs import arguments, numbers, tiny_llama

STEPS = 24


def main(folder: Path, cache: str) -> None:
    """Run to the end and write the digest of the final state."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    tokenizer = load_tokenizer(embedded_model_path())
    text = DataConfig(path=str(embedded_text_path()), sequence_length=32, seed=3, text_separator="\n\n")
    run = Trainer(
        tiny_llama(vocab_size=4096),
        arguments(
            folder, max_steps=STEPS, save_steps=2, eval_steps=8, batch_size=8, gradient_accumulation_steps=2,
            save_total_limit=2,
        ),
        text,
        [first_batch(text, tokenizer)],
        tokenizer=tokenizer,
    )  # fmt: skip
    seen = (folder / "seen.txt").open("a", buffering=1)
    run._step = Noted(run._step, seen)
    result = run.train()
    digest = hashlib.sha256(b"".join(numbers(result.state))).hexdigest()
    (folder / "digest.txt").write_text(f"{result.progress.iteration} {digest}")


class Noted:
    """A step that notes its batches."""

    def __init__(self, step, file):
        self._step, self._file = step, file

    def __call__(self, batch):
        digest = hashlib.sha256(np.asarray(batch["input_ids"]).tobytes()).hexdigest()[:16]
        self._file.write(f"{self._step.iteration} {digest}\n")
        return self._step(batch)

    def __getattr__(self, name):
        return getattr(self._step, name)


def first_batch(text: DataConfig, tokenizer):
    from easydel.training import make_loader

    with make_loader(text, tokenizer, batch_size=8) as loader:
        return next(loader)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
