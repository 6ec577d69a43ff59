"""Softmax cross-entropy over integer labels."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from easydel.loss.config import LossConfig

Metrics = dict[str, jax.Array]


class Sums(NamedTuple):
    """What a cross-entropy adds up over the labels that count.

    Attributes:
        loss: float32 `[]`, the z-loss in it.
        z_loss: float32 `[]`, weighted.
        correct: int32 `[]`, how many targets have the largest logit.
        num_tokens: int32 `[]`, how many labels count.
    """

    loss: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    num_tokens: jax.Array


def first_largest(logits: jax.Array) -> jax.Array:
    """Return `argmax` over the last axis, in two passes that CPUs do in vectors; that of XLA is not."""
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, classes, logits.shape[-1]), axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Compare logits with labels.

    With `lse = logsumexp(logits)` and smoothing `s`, a label costs
    `lse - (1 - s)·logits[label] - s·mean(logits)`, plus `z_loss_coefficient · lse²`.

    Args:
        logits: `[..., classes]`, any float dtype.
        labels: integers `[...]`; those equal to `config.ignore_index` do not count.
        config: smoothing, z-loss, reduction, dtype.

    Returns:
        The loss, float32 `[]` (0 if no label counts; `[...]` with `reduction="none"`), and the metrics `loss` (the
        mean, where there is no reduction), `accuracy`, `num_tokens` and, if asked for, `z_loss`. Only `loss` carries a
        gradient.
    """
    logits = logits.astype(arithmetic_dtype(config))
    counts = labels != config.ignore_index
    # A label out of range gives NaN instead of another class's loss: negative ones would count from the end.
    targets = jnp.where(counts, jnp.where(labels < 0, logits.shape[-1], labels), 0)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    means = logits.mean(axis=-1) if config.label_smoothing else None
    losses, z_losses = token_losses(log_partition, target_logits, means, config)
    sums = Sums(
        loss=total(losses, counts),
        z_loss=total(z_losses, counts),
        correct=jnp.sum(first_largest(logits) == targets, where=counts),
        num_tokens=counts.sum(),
    )
    loss, metrics = reduce_sums(sums, config)
    if config.reduction == "none":
        return jnp.where(counts, losses, 0).astype(jnp.float32), metrics
    return loss, metrics


def token_losses(
    log_partition: jax.Array, target_logits: jax.Array, mean_logits: jax.Array | None, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Return what each label costs, `[...]`, and the z-loss in it; the formula is in `cross_entropy`."""
    losses = log_partition - target_logits
    if mean_logits is not None:
        losses = losses + config.label_smoothing * (target_logits - mean_logits)
    if not config.z_loss_coefficient:
        return losses, jnp.zeros_like(losses)
    z_losses = config.z_loss_coefficient * log_partition**2
    return losses + z_losses, z_losses


def reduce_sums(sums: Sums, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Turn sums into the loss, float32 `[]`, and the metrics."""
    count = jnp.maximum(sums.num_tokens, 1).astype(jnp.float32)
    denominator = divisor(count, config)
    loss = sums.loss / denominator
    metrics = {"loss": loss, "accuracy": sums.correct / count, "num_tokens": sums.num_tokens}
    if config.z_loss_coefficient:
        metrics["z_loss"] = jax.lax.stop_gradient(sums.z_loss / denominator)
    return loss, metrics


def divisor(count: jax.Array, config: LossConfig) -> jax.Array:
    """Return by what a sum over `count` labels is divided, float32 `[]`."""
    if config.reduction == "sum":
        return jnp.float32(1)
    if config.loss_normalizing_factor is not None:
        return jnp.float32(config.loss_normalizing_factor)
    return count.astype(jnp.float32)


def total(losses: jax.Array, counts: jax.Array) -> jax.Array:
    """Add up the losses that count; float32 `[]`, whatever dtype they have."""
    wide = jnp.promote_types(losses.dtype, jnp.float32)
    return jnp.sum(losses.astype(wide), where=counts).astype(jnp.float32)


def arithmetic_dtype(config: LossConfig) -> jnp.dtype:
    """Return the dtype of `config.compute_dtype`.

    Raises:
        ValueError: it is float64, which JAX has switched off.
    """
    dtype = jnp.dtype(config.compute_dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"compute_dtype={config.compute_dtype!r} needs jax.config.update('jax_enable_x64', True); without it JAX "
            f"would compute in {jax.dtypes.canonicalize_dtype(dtype)}"
        )
    return dtype
