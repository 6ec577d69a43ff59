"""Which fields of a `LossConfig` which task reads: one that it does not read must not be set."""

from __future__ import annotations

import dataclasses
from typing import Any

from easydel.errors import UnsupportedError
from easydel.loss.config import LossConfig

LANGUAGE_TASKS = ("causal-lm", "base", "seq2seq", "masked-lm")
TOKEN_TASKS = (*LANGUAGE_TASKS, "token-classification")
TASKS = (*TOKEN_TASKS, "sequence-classification", "question-answering")

_READ_BY: dict[str, tuple[str, ...]] = {
    "shift_tokens": LANGUAGE_TASKS,
    "token_chunk_size": LANGUAGE_TASKS,
    "num_labels": ("token-classification", "sequence-classification"),
    "problem_type": ("sequence-classification",),
}
_OF_CLASSES = ("label_smoothing", "z_loss_coefficient", "ignore_index")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LossConfig)}


def check_task(task: str, config: LossConfig, logits: Any) -> None:
    """Refuse a task without a loss, and fields that the task's loss would not read.

    Raises:
        UnsupportedError: the task has no loss.
        ValueError: a field is set that does not apply, or `num_labels` contradicts the logits.
    """
    if task not in TASKS:
        raise UnsupportedError(f"a loss for the task {task!r} is not supported; those with one: {', '.join(TASKS)}")
    for name, tasks in _READ_BY.items():
        if task not in tasks:
            _refuse(config, name, f"the task {task!r}, only to {', '.join(tasks)}")
    if config.num_labels is not None and config.num_labels != logits.shape[-1]:
        raise ValueError(
            f"num_labels={config.num_labels} of the LossConfig contradicts logits of shape {tuple(logits.shape)}: they "
            f"have {logits.shape[-1]}"
        )


def check_problem(problem: str, config: LossConfig) -> None:
    """Refuse fields about choosing one class where none is chosen (regression, independent labels)."""
    for name in _OF_CLASSES:
        _refuse(config, name, f"problem_type={problem!r}, which does not choose one class")


def _refuse(config: LossConfig, name: str, what: str) -> None:
    if (value := getattr(config, name)) != _DEFAULTS[name]:
        raise ValueError(f"{name}={value!r} of the LossConfig does not apply to {what}; leave it out")
