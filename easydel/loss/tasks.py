"""The loss of each task, as transformers defines them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.errors import UnsupportedError
from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import cross_entropy

Metrics = dict[str, jax.Array]


def task_loss(
    task: str,
    logits: jax.Array,
    labels: jax.Array,
    config: LossConfig | None = None,
    model_config: Any = None,
    auxiliary_loss: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Compute the loss of a task.

    Args:
        task: a task's name. A class registered for no task ("base") is read as a causal language model.
        logits: `[batch, seq, vocab]`, `[batch, labels]` for sequence classification, or `[batch, seq, 2]` (start
            and end) for question answering.
        labels: `[batch, seq]`, `[batch]` / `[batch, labels]` for sequence classification, or `[batch, 2]` (places of
            start and end) for question answering.
        config: how; `LossConfig()` if `None`.
        model_config: read for `problem_type`, and for `router_aux_loss_coef`.
        auxiliary_loss: of a mixture of experts, `[]`; it is added times `config.auxiliary_loss_coefficient`, else times
            `router_aux_loss_coef`.

    Returns:
        The loss, float32 `[]`, and a mapping of metrics.

    Raises:
        ValueError: labels and logits do not belong together.
        UnsupportedError: the task has no loss.
    """
    config = config or LossConfig()
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if task in ("causal-lm", "base"):
        loss, metrics = causal_lm_loss(logits, labels, config)
    elif task == "sequence-classification":
        loss, metrics = sequence_classification_loss(logits, labels, config, model_config)
    elif task in ("masked-lm", "seq2seq", "token-classification"):
        loss, metrics = token_loss(logits, labels, config)
    elif task == "question-answering":
        loss, metrics = question_answering_loss(logits, labels, config)
    else:
        raise UnsupportedError(f"a loss for the task {task!r} is not supported")
    if auxiliary_loss is None:
        return loss, metrics
    weight = config.auxiliary_loss_coefficient
    if weight is None:
        weight = getattr(model_config, "router_aux_loss_coef", 0.0)
    loss = loss + weight * auxiliary_loss
    return loss, metrics | {"loss": loss, "auxiliary_loss": auxiliary_loss}


def causal_lm_loss(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of each token's logits with the *next* token's label; the last position predicts nothing."""
    _check_labels(labels, logits, logits.shape[:-1])
    # Masking the last label leaves the logits whole: slicing them off would copy [batch, seq, vocab].
    nothing = jnp.full_like(labels[:, :1], config.ignore_index)
    return cross_entropy(logits, jnp.concatenate([labels[:, 1:], nothing], axis=1), config)


def sequence_classification_loss(
    logits: jax.Array, labels: jax.Array, config: LossConfig, model_config: Any
) -> tuple[jax.Array, Metrics]:
    """Mean squared error, cross-entropy or binary cross-entropy, by `problem_type`.

    Without a `problem_type`: one label is a regression, integer labels one class each, float labels independent
    probabilities (transformers' rule).
    """
    problem = config.problem_type or getattr(model_config, "problem_type", None)
    if problem is None:
        integers = jnp.issubdtype(labels.dtype, jnp.integer)
        single = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else single
    if problem == "single_label_classification":
        _check_labels(labels.reshape(-1), logits, logits.shape[:-1])
        return cross_entropy(logits, labels.reshape(-1), config)

    logits, targets = logits.astype(jnp.float32), labels.astype(jnp.float32)
    if problem == "regression" and logits.shape[-1] == 1:
        logits, targets = logits[..., 0], targets.reshape(-1)
    if logits.shape != targets.shape:
        raise ValueError(f"{problem} needs labels of the logits' shape {logits.shape}, got {targets.shape}")
    if problem == "regression":
        losses = (logits - targets) ** 2
    else:
        losses = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    loss = losses.mean() if config.reduction == "mean" else losses.sum()
    return loss, {"loss": loss, "num_tokens": jnp.asarray(targets.shape[0])}


def token_loss(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of each token's logits with its own label; if anything was shifted, it was the inputs."""
    _check_labels(labels, logits, logits.shape[:-1])
    return cross_entropy(logits, labels, config)


def question_answering_loss(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Mean of two cross-entropies over the places of a sequence: of the answer's start and of its end.

    As in transformers a place past the sequence (an answer that was cut off) does not count, and a negative one means
    the first place, where models are taught to point if there is no answer.
    """
    _check_labels(labels, logits, (*logits.shape[:-2], logits.shape[-1]))
    length = logits.shape[-2]
    places = jnp.where(labels >= length, config.ignore_index, jnp.maximum(labels, 0))
    parts = [cross_entropy(logits[..., side], places[..., side], config) for side in range(logits.shape[-1])]
    loss = jnp.stack([part for part, _ in parts]).mean()
    counts = jnp.stack([metrics["num_tokens"] for _, metrics in parts])
    hits = jnp.stack([metrics["accuracy"] for _, metrics in parts]) * counts
    total = counts.sum()
    return loss, {"loss": loss, "accuracy": hits.sum() / jnp.maximum(total, 1), "num_tokens": total}


def _check_labels(labels: jax.Array, logits: jax.Array, expected: tuple[int, ...]) -> None:
    if labels.shape != expected:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit logits of shape {logits.shape}: expected {expected}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
