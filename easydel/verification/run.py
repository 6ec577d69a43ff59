"""Run a checkpoint here and in transformers, and compare."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydel.verification.report import Part, Verification

if TYPE_CHECKING:
    import numpy as np

    from easydel.infra.registry import TaskType
    from easydel.verification.compare import Comparison

TOLERANCES = {
    # Sums in another order: small models of all families differ by up to 5e-6, wrong numbers by far more.
    "float32": 1e-4,
    # A rounding is 2^-9 = 2e-3, and each layer adds several: six layers make 1.2e-2.
    "bfloat16": 5e-2,
}


def verify(
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    task: TaskType | str | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    batch: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    text: str | None = None,
    revision: str | None = None,
) -> Verification:
    """Compare what a checkpoint gives here with what it gives in transformers, part by part, on the CPU.

    Both models get the same tokens; the last row of several ends with padding, where nothing is compared. One model is
    in memory at a time: of the first only what its modules returned is kept.

    Args:
        pretrained_model_name_or_path: a directory or a Hub id.
        task: which class; `None`: the one that the config's `architectures` names.
        dtype: of parameters and computations, `"float32"` or `"bfloat16"`.
        tolerance: largest error allowed, `max|ours - theirs| / max|theirs|` of each part; `None`: 1e-4 in float32, 5e-2
            in bfloat16, where single roundings are 2e-3.
        batch: rows of random tokens; `None`: 2.
        length: tokens of a row; `None`: 16.
        seed: of the random tokens; `None`: 0.
        text: compare on this instead of random tokens; the checkpoint's tokenizer is used.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: the checkpoint does not load; what is missing, unexpected or of another shape is listed.
        UnsupportedError: torch is not installed, or one of the libraries lacks the model.
        ValueError: a text together with what random tokens have, or a wrong `dtype`, `task`, `batch` or `length`.
    """
    from easydel.hub.resolve import resolve_checkpoint
    from easydel.verification.choose import choose_classes
    from easydel.verification.compare import Comparison
    from easydel.verification.matching import match_modules
    from easydel.verification.reference import load_reference, require_torch, run_reference

    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    if text is not None and (batch, length, seed) != (None, None, None):
        raise ValueError("batch, length and seed are of random tokens: leave them out, or the text")
    require_torch()
    directory = resolve_checkpoint(pretrained_model_name_or_path, revision=revision)
    choice = choose_classes(directory, task)
    inputs, calls, outputs, held = _run_ours(choice.ours, directory, dtype, batch, length, seed or 0, text)
    theirs, their_outputs, tensors = run_reference(load_reference(choice.theirs, directory, dtype), inputs)
    names = match_modules(
        {path: sets for path, sets in held.items() if path in calls},
        {name: own for name, own in tensors.items() if name in theirs},
    )
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    comparison = Comparison(calls, theirs, names, inputs["attention_mask"], allowed)
    parts, inside, first = _compared(comparison, outputs, their_outputs)
    rows, tokens = inputs["input_ids"].shape
    return Verification(
        str(pretrained_model_name_or_path), choice.ours.__name__, dtype, allowed, rows, tokens, parts, inside, first
    )


def _run_ours(
    cls: Any, directory: Path, dtype: str, batch: int | None, length: int | None, seed: int, text: str | None
) -> tuple[Any, Any, Any, Any]:
    import jax
    import jax.numpy as jnp

    from easydel.hub.tokenizer import load_tokenizer
    from easydel.verification.inputs import random_inputs, text_inputs
    from easydel.verification.matching import held_tensors
    from easydel.verification.recording import run_recorded

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # One by one and not for gradients: what is traced cannot be recorded.
        model = cls.from_pretrained(directory, dtype=jnp.dtype(dtype), scan_layers=False, gradient_checkpointing="none")
        if text is None:
            inputs = random_inputs(model, batch=batch, length=length, seed=seed)
        else:
            inputs = text_inputs(model, load_tokenizer(directory), text)
        return inputs, *run_recorded(model, inputs), held_tensors(model)


def _compared(
    comparison: Comparison, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[tuple[Part, ...], tuple[Part, ...], Part | None]:
    """Return all parts, what is inside the first that differs, and where it begins."""
    from easydel.errors import UnsupportedError
    from easydel.verification.compare import first_inside
    from easydel.verification.matching import is_layer

    stages, common = comparison.stages(), [name for name in theirs if name in ours]
    lost = [path for path in comparison.ours if is_layer(path) and path not in comparison.names]
    if lost or not stages or not common:  # nothing is called equal that was not compared
        what = ", ".join(lost[:5]) or ("any layer" if not stages else f"any of {', '.join(theirs)} in what is returned")
        raise UnsupportedError(f"comparing this model is not supported: the two libraries do not both have {what}")
    last, end = stages[-1][0], len(comparison.theirs)
    stages += [(end, comparison.part(name, "", ours[name], theirs[name])) for name in common]
    parts, after = tuple(part for _, part in stages), -1.0
    for time, part in stages:
        if not part.agrees:
            inside = comparison.inside(part, min(after, last), time)
            return parts, tuple(inside), first_inside(part, inside, comparison.tolerance)
        after = time
    return parts, (), None
