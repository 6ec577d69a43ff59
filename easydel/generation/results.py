"""What is handed back of a generation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from easydel.distributed import whole
from easydel.generation.options import GenerationOptions
from easydel.generation.search import Progress
from easydel.outputs import GenerationOutput


def output_of(progress: Progress, prompt: np.ndarray, options: GenerationOptions) -> GenerationOutput:
    """Return the output of a generation.

    Args:
        progress: where it ended.
        prompt: as given, int32 `[batch, seq]`.
        options: what was asked for.
    """
    step = int(progress.written.step)
    begin = int(progress.written.length) - step
    recorded: dict[str, Any] = {"scores": _steps(progress.scores, step), "logits": _steps(progress.logits, step)}
    if progress.hypotheses is None:
        rows = len(prompt) * options.num_return_sequences
        new = whole(progress.written.tokens)[:rows, begin : begin + step]
    else:
        best = jax.tree.map(
            lambda kept: whole(kept)[: len(prompt), : options.num_return_sequences], _best(progress.hypotheses)
        )
        paths = best["paths"].reshape(-1, best["paths"].shape[-1])
        longest = int((paths >= 0).sum(axis=1).max())
        new = best["tokens"].reshape(len(paths), -1)[:, begin : begin + longest]
        recorded["beam_indices"] = jax.device_put(paths[:, :longest])
        recorded["sequences_scores"] = jax.device_put(best["scores"].reshape(-1))
    prompt = np.repeat(prompt, options.num_return_sequences, axis=0)
    # device_put compiles nothing, jnp.asarray a program for each new shape.
    return GenerationOutput(sequences=jax.device_put(np.concatenate([prompt, new], axis=1)), **recorded)


def _best(hypotheses: Any) -> dict[str, Any]:
    return {"tokens": hypotheses.tokens, "paths": hypotheses.done_paths, "scores": hypotheses.scores}


def _steps(record: jax.Array | None, step: int) -> tuple[jax.Array, ...] | None:
    return None if record is None else tuple(jax.device_put(list(whole(record)[:step])))
