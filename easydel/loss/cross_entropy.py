"""Softmax cross-entropy over integer labels, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from easydel.loss.config import LossConfig


def cross_entropy(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compare logits with labels.

    With `lse = logsumexp(logits)` and smoothing `s`, a label costs
    `lse - (1 - s)·logits[label] - s·mean(logits)`, plus `z_loss_coefficient · lse²`.

    Args:
        logits: `[..., classes]`, any float dtype.
        labels: integers `[...]`; those equal to `config.ignore_index` do not count.
        config: smoothing, z-loss, reduction.

    Returns:
        The loss, float32 `[]` (0 if no label counts), and the metrics `loss`, `accuracy`, `num_tokens` and, if
        asked for, `z_loss`.
    """
    logits = logits.astype(jnp.float32)
    counts = labels != config.ignore_index
    # A label out of range gives NaN instead of another class's loss: negative ones would count from the end.
    targets = jnp.where(counts, jnp.where(labels < 0, logits.shape[-1], labels), 0)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = log_partition - target_logits
    if config.label_smoothing:
        mean_logits = logits.mean(axis=-1)
        losses = losses + config.label_smoothing * (target_logits - mean_logits)

    num_tokens = counts.sum()
    denominator = jnp.maximum(num_tokens, 1).astype(jnp.float32) if config.reduction == "mean" else jnp.float32(1)
    loss = jnp.sum(losses, where=counts) / denominator
    correct = jnp.sum(logits.argmax(axis=-1) == targets, where=counts)
    metrics = {"accuracy": correct / jnp.maximum(num_tokens, 1), "num_tokens": num_tokens}
    if config.z_loss_coefficient:
        z_loss = config.z_loss_coefficient * jnp.sum(log_partition**2, where=counts) / denominator
        loss, metrics = loss + z_loss, metrics | {"z_loss": z_loss}
    return loss, {"loss": loss} | metrics
