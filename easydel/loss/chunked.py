"""Cross-entropy from a head's hidden states, a few tokens' logits at a time.

The gradient is this file's own. While a chunk's logits exist, so does their gradient in closed form,
`softmax·(1 + 2·z·lse) - (1 - s)·onehot - s/vocab`; contracted at once with the kernel and with the hidden states, it
leaves only what the backward pass needs: two arrays of *their* sizes. Nothing is computed twice (as in Liger Kernel,
arXiv:2410.10989).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import (
    Metrics,
    Sums,
    arithmetic_dtype,
    first_largest,
    reduce_sums,
    token_losses,
    total,
)
from easydel.loss.uncomputed import UncomputedLogits
from easydel.sharding import activation_mesh, constrain, current_mesh
from easydel.sharding.activations import activation_spec

MOST_LOGITS = 2**26
"""Logits on each device at once, if nobody says otherwise: 256 MiB of float32. Smaller chunks were slower on CPU."""

ROWS = ("batch", "sequence", None)
"""The roles of a chunk's first dimensions: it is cut within each device's own rows, so that none leaves its device."""


@dataclass(frozen=True)
class _How:
    """What is static: settings, and the mesh, which is not ambient any more when a gradient is traced later."""

    config: LossConfig
    transposed: bool
    soft_cap: float | None
    precision: Any
    mesh: Any


def chunked_cross_entropy(logits: UncomputedLogits, labels: jax.Array, config: LossConfig) -> tuple[jax.Array, Metrics]:
    """Compute `cross_entropy` of logits `[batch, seq, vocab]` that are never there all at once.

    Products are summed, and their results used, in `config.compute_dtype`: with half-precision weights the logits are
    not rounded in between, as they are where a forward pass returns them.

    Args:
        logits: the hidden states `[batch, seq, features]` and the head.
        labels: integers `[batch, seq]`.
        config: `token_chunk_size` and whatever `cross_entropy` reads.

    Returns:
        The loss, float32 `[]`, and the metrics, as `cross_entropy` gives them.
    """
    batch, length, _ = logits.hidden.shape
    groups = _groups((batch, length))
    rows = batch * length // (groups[0] * groups[1])
    chunks = -(-rows // _chunk_size(config, logits.vocab_size, rows))
    how = _How(config, logits.transposed, logits.soft_cap, logits.precision, current_mesh())
    hidden = _cut(logits.hidden, groups, chunks, 0)
    targets = _cut(labels, groups, chunks, config.ignore_index)
    loss, z_loss, correct = _sums(how, hidden, logits.kernel, logits.bias, targets)
    return reduce_sums(Sums(loss, z_loss, correct, jnp.sum(labels != config.ignore_index)), config)


def _groups(shape: tuple[int, int]) -> tuple[int, int]:
    """Return into how many parts the mesh splits batch and sequence."""
    mesh = current_mesh()
    if mesh is None:
        return 1, 1
    parts = [1, 1]
    for dim, entry in enumerate(activation_spec(shape, *ROWS[:2])):
        for axis in () if entry is None else entry if isinstance(entry, tuple) else (entry,):
            parts[dim] *= mesh.shape[axis]
    return parts[0], parts[1]


def _chunk_size(config: LossConfig, vocab: int, rows: int) -> int:
    if config.token_chunk_size != "auto":
        return int(config.token_chunk_size)  # type: ignore[arg-type]  # the config has checked it
    mesh = current_mesh()
    split = mesh is not None and any(activation_spec((vocab,), "vocab"))
    parts = mesh.shape["tp"] if mesh is not None and split else 1
    return min(rows, max(128, MOST_LOGITS * parts // vocab // 128 * 128))


def _cut(x: jax.Array, groups: tuple[int, int], chunks: int, fill: Any) -> jax.Array:
    """Cut `[batch, seq, …]` into `[chunks, batch parts, sequence parts, tokens, …]`, filled up at the end."""
    (batch, length), rest = x.shape[:2], x.shape[2:]
    x = x.reshape(groups[0], batch // groups[0], groups[1], length // groups[1], *rest).swapaxes(1, 2)
    x = x.reshape(*groups, -1, *rest)
    size = -(-x.shape[2] // chunks)
    missing = chunks * size - x.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), *((0, 0) for _ in rest)], constant_values=fill)
    x = jnp.moveaxis(x.reshape(*groups, chunks, size, *rest), 2, 0)
    return constrain(x, None, *ROWS, *(None for _ in rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the summed loss, the z-loss in it and the count of correct tokens; only the first has a gradient.

    Args:
        how: settings.
        hidden: `[chunks, groups, groups, tokens, features]`.
        kernel: as `UncomputedLogits` has it.
        bias: `[vocab]` or `None`.
        targets: integers `[chunks, groups, groups, tokens]`.
    """

    def step(sums: Any, chunk: Any) -> Any:
        logits = _logits(how, chunk[0], kernel, bias)
        return _add(sums, _measure(how, logits, chunk[1])[0]), None

    with activation_mesh(how.mesh):
        kernel = _whole(how, kernel)
        return jax.lax.scan(step, _zeros(), (hidden, targets))[0]


def _forward(how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array) -> Any:
    """Compute the sums and, in the same pass, the gradients of the loss."""
    groups = hidden.shape[1:3]
    wide = jnp.promote_types(jnp.float32, kernel.dtype)

    def step(carry: Any, chunk: Any) -> Any:
        sums, kernel_gradient, bias_gradient = carry
        logits = _logits(how, chunk[0], kernel, bias)
        measured, log_partition, hits = _measure(how, logits, chunk[1])
        gradient = _logits_gradient(how, logits, log_partition, hits, chunk[1])
        if bias is not None:
            bias_gradient = bias_gradient + jnp.sum(gradient.astype(wide), axis=2)
        gradient = gradient.astype(kernel.dtype)
        options = {"precision": how.precision, "preferred_element_type": wide}
        # One sum for each group of devices: adding those up here would be an all-reduce for every chunk.
        pair = "bstv,bsth->bsvh" if how.transposed else "bsth,bstv->bshv"
        operands = (gradient, chunk[0]) if how.transposed else (chunk[0], gradient)
        kernel_gradient = _spread(how, kernel_gradient + jnp.einsum(pair, *operands, **options))
        back = "bstv,vh->bsth" if how.transposed else "bstv,hv->bsth"
        hidden_gradient = jnp.einsum(back, gradient, kernel, **options).astype(hidden.dtype)
        return (_add(sums, measured), kernel_gradient, bias_gradient), constrain(hidden_gradient, *ROWS, None)

    with activation_mesh(how.mesh):
        kernel = _whole(how, kernel)
        start = _spread(how, jnp.zeros((*groups, *kernel.shape), wide))
        bias_start: Any = None if bias is None else jnp.zeros((*groups, *bias.shape), wide)
        carried, hidden_gradient = jax.lax.scan(step, (_zeros(), start, bias_start), (hidden, targets))
        sums, kernel_gradient, bias_gradient = carried
    kernel_gradient = _join(kernel_gradient).astype(kernel.dtype)
    if bias is not None:
        bias_gradient = _join(bias_gradient).astype(bias.dtype)
    return sums, (hidden_gradient, kernel_gradient, bias_gradient)


def _backward(how: _How, gradients: Any, cotangents: Any) -> Any:
    """Scale what the forward pass has left."""
    del how

    def scaled(gradient: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.float32, gradient.dtype)
        return (gradient.astype(wide) * cotangents[0]).astype(gradient.dtype)

    return (*jax.tree.map(scaled, gradients), None)  # targets are integers


_sums.defvjp(_forward, _backward)


def _logits(how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return a chunk's logits, `[groups, groups, tokens, vocab]`."""
    dtype = arithmetic_dtype(how.config)
    product = "bsth,vh->bstv" if how.transposed else "bsth,hv->bstv"
    wide = jnp.promote_types(dtype, jnp.float32)
    logits = jnp.einsum(product, hidden, kernel, precision=how.precision, preferred_element_type=wide)
    logits = constrain(logits, *ROWS, "vocab").astype(dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    return logits if how.soft_cap is None else jnp.tanh(logits / how.soft_cap) * how.soft_cap


def _measure(how: _How, logits: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Return a chunk's sums, its log-partitions `[groups, groups, tokens]`, and where the targets are, as booleans."""
    counts = targets != how.config.ignore_index
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 3)
    hits = classes == targets[..., None]
    known = (targets >= 0) & (targets < logits.shape[-1])
    target_logits = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    target_logits = jnp.where(known, target_logits, jnp.nan)  # as in `cross_entropy`
    largest = logits.max(axis=-1, keepdims=True)
    log_partition = jnp.log(jnp.exp(logits - largest).sum(axis=-1)) + largest[..., 0]
    means = logits.mean(axis=-1) if how.config.label_smoothing else None
    losses, z_losses = token_losses(log_partition, target_logits, means, how.config)
    correct = jnp.sum(first_largest(logits) == targets, where=counts)
    return (total(losses, counts), total(z_losses, counts), correct), log_partition, hits


def _logits_gradient(
    how: _How, logits: jax.Array, log_partition: jax.Array, hits: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return the gradient of the summed loss by what the head makes, soft-capping undone."""
    smoothing, z = how.config.label_smoothing, how.config.z_loss_coefficient
    gradient = jnp.exp(logits - log_partition[..., None])
    if z:
        gradient = gradient * (1 + 2 * z * log_partition[..., None])
    gradient = gradient - jnp.where(hits, 1 - smoothing, 0).astype(gradient.dtype)
    if smoothing:
        gradient = gradient - smoothing / logits.shape[-1]
    if how.soft_cap is not None:
        gradient = gradient * (1 - (logits / how.soft_cap) ** 2)
    return jnp.where((targets != how.config.ignore_index)[..., None], gradient, 0)


def _whole(how: _How, kernel: jax.Array) -> jax.Array:
    """Bring the kernel's features together before the loop; its vocabulary stays split."""
    return constrain(kernel, *(("vocab", None) if how.transposed else (None, "vocab")))


def _spread(how: _How, gradient: jax.Array) -> jax.Array:
    """Keep each group's share of the kernel's gradient on the group's devices."""
    return constrain(gradient, *ROWS[:2], *(("vocab", None) if how.transposed else (None, "vocab")))


def _join(gradient: jax.Array) -> jax.Array:
    """Add up the groups' shares; one alone is not copied."""
    single = gradient.shape[:2] == (1, 1)
    return gradient.reshape(gradient.shape[2:]) if single else gradient.sum(axis=(0, 1))


def _zeros() -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.float32(0), jnp.float32(0), jnp.int32(0)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)
