"""The loss of each task, as transformers defines them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.errors import UnsupportedError
from easydel.loss.applicable import TOKEN_TASKS, check_problem, check_task
from easydel.loss.chunked import chunked_cross_entropy
from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import Metrics, arithmetic_dtype, cross_entropy, divisor, total
from easydel.loss.uncomputed import UncomputedLogits, refuse_chunks


def task_loss(
    task: str,
    logits: jax.Array | UncomputedLogits,
    labels: jax.Array,
    config: LossConfig | None = None,
    model_config: Any = None,
    auxiliary_loss: jax.Array | None = None,
    router_z_loss: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Compute the loss of a task.

    A mean is over the labels that count, `metrics["num_tokens"]` of them, so that batches of any size combine exactly:
    `sum(loss · num_tokens) / sum(num_tokens)`, for losses and gradients alike. Two exceptions: the losses of a mixture
    of experts look at a whole batch, and question answering averages starts and ends apart.

    Args:
        task: a task's name. A class registered for no task ("base") is read as a causal language model.
        logits: `[batch, seq, vocab]` (or what a head leaves uncomputed), `[batch, labels]` for sequence
            classification, or `[batch, seq, 2]` (start and end) for question answering.
        labels: `[batch, seq]`, `[batch]` / `[batch, labels]` for sequence classification, or `[batch, 2]` (places of
            start and end) for question answering.
        config: how; `LossConfig()` if `None`.
        model_config: read for `problem_type`, and for `router_aux_loss_coef`.
        auxiliary_loss: of a mixture of experts, `[]`; it is added times `config.auxiliary_loss_coefficient`, else times
            `router_aux_loss_coef`.
        router_z_loss: likewise, times `config.router_z_loss_coefficient`.

    Returns:
        The loss, float32 `[]` (one for each label with `reduction="none"`), and a mapping of metrics.

    Raises:
        ValueError: labels and logits do not belong together, or `config` sets a field that does not apply to the task.
        UnsupportedError: the task has no loss.
    """
    config = config or LossConfig()
    logits = logits if isinstance(logits, UncomputedLogits) else jnp.asarray(logits)
    labels = jnp.asarray(labels)
    check_task(task, config, logits)
    refuse_chunks(config, logits)
    if task in ("causal-lm", "base") if config.shift_tokens is None else config.shift_tokens:
        loss, metrics = causal_lm_loss(logits, labels, config)
    elif task in TOKEN_TASKS:
        loss, metrics = token_loss(logits, labels, config)
    elif isinstance(logits, UncomputedLogits):
        raise ValueError(f"the task {task!r} needs logits that are computed")
    elif task == "sequence-classification":
        loss, metrics = sequence_classification_loss(logits, labels, config, model_config)
    else:
        loss, metrics = question_answering_loss(logits, labels, config)
    return _with_experts(loss, metrics, config, model_config, auxiliary_loss, router_z_loss)


def _with_experts(
    loss: jax.Array, metrics: Metrics, config: LossConfig, model_config: Any, balance: Any, router_z: Any
) -> tuple[jax.Array, Metrics]:
    """Add what a mixture of experts' routers cost."""
    weight = config.auxiliary_loss_coefficient
    if weight is None:
        weight = getattr(model_config, "router_aux_loss_coef", 0.0)
    if router_z is None and config.router_z_loss_coefficient:
        raise ValueError(
            f"router_z_loss_coefficient={config.router_z_loss_coefficient} of the LossConfig needs what routers said, "
            "and there is none: it applies to a forward pass of a model with experts, not to logits alone"
        )
    found = (
        ("auxiliary_loss", balance, weight),
        ("router_z_loss", router_z, config.router_z_loss_coefficient),
    )
    for name, value, coefficient in found:
        if value is None:
            continue
        if config.reduction == "none" and coefficient:
            raise UnsupportedError(
                f"reduction='none' with {name} of weight {coefficient} is not supported: it belongs to no single "
                f"label; set its coefficient in the LossConfig to 0 and read metrics[{name!r}]"
            )
        metrics = metrics | {name: value}
        if coefficient:
            loss = loss + coefficient * value
            metrics["loss"] = loss
    return loss, metrics


def causal_lm_loss(
    logits: jax.Array | UncomputedLogits, labels: jax.Array, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of each token's logits with the *next* token's label; the last position predicts nothing.

    Args:
        logits: `[batch, seq, vocab]`, of any float dtype, or what a head leaves uncomputed.
        labels: integers `[batch, seq]`, the tokens themselves.
        config: how.

    Returns:
        The loss, float32 `[]`, or with `reduction="none"` `[batch, seq]`, where what predicts a token has its loss; and
        metrics.
    """
    _check_labels(labels, logits, logits.shape[:-1])
    # Masking the last label leaves the logits whole: slicing them off would copy [batch, seq, vocab].
    nothing = jnp.full_like(labels[:, :1], config.ignore_index)
    return token_loss(logits, jnp.concatenate([labels[:, 1:], nothing], axis=1), config)


def token_loss(
    logits: jax.Array | UncomputedLogits, labels: jax.Array, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of each token's logits with its own label; if anything was shifted, it was the inputs.

    Sequence-to-sequence models, masked language models and token classifiers.

    Args:
        logits: `[batch, seq, classes]`, of any float dtype, or what a head leaves uncomputed.
        labels: integers `[batch, seq]`.
        config: how.

    Returns:
        The loss, float32 `[]` (`[batch, seq]` with `reduction="none"`), and metrics.
    """
    _check_labels(labels, logits, logits.shape[:-1])
    refuse_chunks(config, logits)
    if isinstance(logits, UncomputedLogits):
        return chunked_cross_entropy(logits, labels, config)
    return cross_entropy(logits, labels, config)


def sequence_classification_loss(
    logits: jax.Array, labels: jax.Array, config: LossConfig, model_config: Any = None
) -> tuple[jax.Array, Metrics]:
    """Mean squared error, cross-entropy or binary cross-entropy, by `problem_type`.

    Without a `problem_type`: one label is a regression, integer labels one class each, float labels independent
    probabilities (transformers' rule).

    Args:
        logits: `[batch, labels]`, of any float dtype.
        labels: integers `[batch]`, or floats `[batch, labels]` (`[batch]` for a regression with one label).
        config: how.
        model_config: read for `problem_type`.

    Returns:
        The loss, float32 `[]` (with `reduction="none"` of the labels' shape), and metrics; `num_tokens` are sequences.
    """
    problem = config.problem_type or getattr(model_config, "problem_type", None)
    if problem is None:
        integers = jnp.issubdtype(labels.dtype, jnp.integer)
        single = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else single
    if problem == "single_label_classification":
        _check_labels(labels.reshape(-1), logits, logits.shape[:-1])
        return cross_entropy(logits, labels.reshape(-1), config)

    check_problem(problem, config)
    logits, targets = (x.astype(arithmetic_dtype(config)) for x in (logits, labels))
    if problem == "regression" and logits.shape[-1] == 1:
        logits, targets = logits[..., 0], targets.reshape(-1)
    if logits.shape != targets.shape:
        raise ValueError(f"{problem} needs labels of the logits' shape {logits.shape}, got {targets.shape}")
    if problem == "regression":
        losses = (logits - targets) ** 2
    else:
        losses = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    mean = total(losses, jnp.bool_(True)) / divisor(jnp.float32(max(losses.size, 1)), config)
    loss = losses.astype(jnp.float32) if config.reduction == "none" else mean
    return loss, {"loss": mean, "num_tokens": jnp.asarray(targets.shape[0])}


def question_answering_loss(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Mean of two cross-entropies over the places of a sequence: of the answer's start and of its end.

    As in transformers a place past the sequence (an answer that was cut off) does not count, and a negative one means
    the first place, where models are taught to point if there is no answer. Each side is a mean over *its* places that
    count. So batches combine exactly by `num_tokens`, the places of both sides, if as many starts as ends count in each
    of them; where answers are cut off between the two, no single weight could do it. With a `loss_normalizing_factor`
    or `reduction="sum"` batches add up whatever is cut off.

    Args:
        logits: `[batch, seq, 2]`, of any float dtype.
        labels: integers `[batch, 2]`.
        config: how.

    Returns:
        The loss, float32 `[]` (`[batch, 2]`, of each place, with `reduction="none"`), and metrics.
    """
    _check_labels(labels, logits, (*logits.shape[:-2], logits.shape[-1]))
    length = logits.shape[-2]
    places = jnp.where(labels >= length, config.ignore_index, jnp.maximum(labels, 0))
    parts = [cross_entropy(logits[..., side], places[..., side], config) for side in range(logits.shape[-1])]
    each = {name: jnp.stack([metrics[name] for _, metrics in parts]) for name in parts[0][1]}
    count = each["num_tokens"].sum()
    metrics = {name: values.mean() for name, values in each.items() if name in ("loss", "z_loss")} | {
        "accuracy": (each["accuracy"] * each["num_tokens"]).sum() / jnp.maximum(count, 1),
        "num_tokens": count,
    }
    losses = jnp.stack([loss for loss, _ in parts], axis=-1)
    return losses if config.reduction == "none" else metrics["loss"], metrics


def _check_labels(labels: jax.Array, logits: Any, expected: tuple[int, ...]) -> None:
    if labels.shape != expected:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit logits of shape {logits.shape}: expected {expected}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
