"""Cross-entropy from a head's hidden states, a few tokens' logits at a time.

The gradient is this file's own. While a chunk's logits exist, so does their gradient in closed form,
`softmax·(1 + 2·z·lse) - (1 - s)·onehot - s/vocab`; contracted at once with the kernel and with the hidden states, it
leaves only what the backward pass needs: two arrays of *their* sizes. Nothing is computed twice (as in Liger Kernel,
arXiv:2410.10989).
"""

from __future__ import annotations

import functools
import math
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

MOST_LOGITS = 2**27
"""Logits on each device at once, if nobody says otherwise: 512 MiB of float32. Smaller chunks were slower on CPU."""

BLOCK = 8192
"""Classes whose part of the kernel's gradient is added up at once. All of it, made anew for each chunk, would take
the kernel's size once more, and the time to write and read it."""

GROUPS = ("batch", "sequence")
"""The roles of a chunk's first dimensions where a mesh splits either: it is cut within each device's own rows, so that
none leaves its device. Else a chunk has no such dimensions."""


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
    rows = batch * length // math.prod(groups)
    chunks = -(-rows // _chunk_size(config, logits.vocab_size, rows))
    how = _How(config, logits.transposed, logits.soft_cap, logits.precision, current_mesh())
    hidden = _cut(logits.hidden, groups, chunks, 0)
    targets = _cut(labels, groups, chunks, config.ignore_index)
    loss, z_loss, correct = _sums(how, hidden, logits.kernel, logits.bias, targets)
    return reduce_sums(Sums(loss, z_loss, correct, jnp.sum(labels != config.ignore_index)), config)


def _groups(shape: tuple[int, int]) -> tuple[int, ...]:
    """Return into how many parts the mesh splits batch and sequence; nothing if it splits neither."""
    mesh = current_mesh()
    if mesh is None:
        return ()
    parts = [1, 1]
    for dim, entry in enumerate(activation_spec(shape, *GROUPS)):
        for axis in () if entry is None else entry if isinstance(entry, tuple) else (entry,):
            parts[dim] *= mesh.shape[axis]
    return () if parts == [1, 1] else tuple(parts)


def _vocabulary_is_split(mesh: Any, vocab: int) -> bool:
    return mesh is not None and any(activation_spec((vocab,), "vocab"))


def _chunk_size(config: LossConfig, vocab: int, rows: int) -> int:
    if config.token_chunk_size != "auto":
        return int(config.token_chunk_size)  # type: ignore[arg-type]  # the config has checked it
    mesh = current_mesh()
    parts = mesh.shape["tp"] if mesh is not None and _vocabulary_is_split(mesh, vocab) else 1
    return min(rows, max(128, MOST_LOGITS * parts // vocab // 128 * 128))


def _cut(x: jax.Array, groups: tuple[int, ...], chunks: int, fill: Any) -> jax.Array:
    """Cut `[batch, seq, …]` into `[chunks, *groups, tokens, …]`, filled up at the end."""
    (batch, length), rest, axis = x.shape[:2], x.shape[2:], len(groups)
    if groups:
        x = x.reshape(groups[0], batch // groups[0], groups[1], length // groups[1], *rest).swapaxes(1, 2)
    x = x.reshape(*groups, -1, *rest)
    size = -(-x.shape[axis] // chunks)
    missing = chunks * size - x.shape[axis]
    x = jnp.pad(x, [*((0, 0) for _ in groups), (0, missing), *((0, 0) for _ in rest)], constant_values=fill)
    x = jnp.moveaxis(x.reshape(*groups, chunks, size, *rest), axis, 0)
    return constrain(x, None, *GROUPS[:axis], None, *(None for _ in rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the summed loss, the z-loss in it and the count of correct tokens; only the first has a gradient.

    Args:
        how: settings.
        hidden: `[chunks, *groups, tokens, features]`.
        kernel: as `UncomputedLogits` has it.
        bias: `[vocab]` or `None`.
        targets: integers `[chunks, *groups, tokens]`.
    """

    def step(sums: Any, chunk: Any) -> Any:
        logits = _logits(how, chunk[0], kernel, bias)
        return _add(sums, _measure(how, logits, chunk[1])[0]), None

    with activation_mesh(how.mesh):
        kernel = _whole(how, kernel)
        return jax.lax.scan(step, _zeros(), (hidden, targets))[0]


def _forward(how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array) -> Any:
    """Compute the sums and, in the same pass, the gradients of the loss."""
    groups = hidden.shape[1:-2]
    wide = jnp.promote_types(jnp.float32, kernel.dtype)

    def step(carry: Any, chunk: Any) -> Any:
        sums, kernel_gradient, bias_gradient = carry
        logits = _logits(how, chunk[0], kernel, bias)
        measured, log_partition, hits = _measure(how, logits, chunk[1])
        gradient = _logits_gradient(how, logits, log_partition, hits, chunk[1])
        if bias is not None:
            bias_gradient = bias_gradient + jnp.sum(gradient.astype(wide), axis=-2)
        gradient = gradient.astype(kernel.dtype)
        options = {"precision": how.precision, "preferred_element_type": wide}
        kernel_gradient = _spread(how, _add_products(how, kernel_gradient, chunk[0], gradient))
        back = "...tv,vh->...th" if how.transposed else "...tv,hv->...th"
        hidden_gradient = jnp.einsum(back, gradient, kernel, **options).astype(hidden.dtype)
        return (_add(sums, measured), kernel_gradient, bias_gradient), _constrain(hidden_gradient, None, None)

    with activation_mesh(how.mesh):
        kernel = _whole(how, kernel)
        start = _spread(how, jnp.zeros((*groups, *kernel.shape), wide))
        bias_start: Any = None if bias is None else jnp.zeros((*groups, *bias.shape), wide)
        carried, hidden_gradient = jax.lax.scan(step, (_zeros(), start, bias_start), (hidden, targets))
        sums, kernel_gradient, bias_gradient = carried
    each = tuple(range(len(groups)))  # none, and no sum, if there is one group
    kernel_gradient = kernel_gradient.sum(each).astype(kernel.dtype)
    if bias is not None:
        bias_gradient = bias_gradient.sum(each).astype(bias.dtype)
    return sums, (hidden_gradient, kernel_gradient, bias_gradient)


def _add_products(how: _How, total: jax.Array, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
    """Add a chunk's share of the kernel's gradient, a block of classes at a time where they all are on each device.

    Args:
        how: settings.
        total: `[*groups, features, vocab]`, or the last two the other way round. One sum for each group of devices:
            adding those up here would be an all-reduce for every chunk.
        hidden: `[*groups, tokens, features]`.
        gradient: by the logits, `[*groups, tokens, vocab]`.
    """
    pair = "...tv,...th->...vh" if how.transposed else "...th,...tv->...hv"
    axis, vocab = total.ndim - (2 if how.transposed else 1), gradient.shape[-1]

    blocks = 1 if _vocabulary_is_split(how.mesh, vocab) else -(-vocab // BLOCK)
    size = -(-vocab // blocks)

    def add(block: Any, total: jax.Array) -> jax.Array:
        start = jnp.minimum(block * size, vocab - size)  # the last block reaches back to what has been added
        part = jax.lax.dynamic_slice_in_dim(gradient, start, size, gradient.ndim - 1)
        if vocab % blocks:
            part = jnp.where(start + jnp.arange(size) >= block * size, part, 0)
        operands = (part, hidden) if how.transposed else (hidden, part)
        product = jnp.einsum(pair, *operands, precision=how.precision, preferred_element_type=total.dtype)
        sums = jax.lax.dynamic_slice_in_dim(total, start, size, axis) + product
        return jax.lax.dynamic_update_slice_in_dim(total, sums, start, axis)

    return add(0, total) if blocks == 1 else jax.lax.fori_loop(0, blocks, add, total)


def _backward(how: _How, gradients: Any, cotangents: Any) -> Any:
    """Scale what the forward pass has left."""
    del how

    def scaled(gradient: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.float32, gradient.dtype)
        return (gradient.astype(wide) * cotangents[0]).astype(gradient.dtype)

    return (*jax.tree.map(scaled, gradients), None)  # targets are integers


_sums.defvjp(_forward, _backward)


def _logits(how: _How, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return a chunk's logits, `[*groups, tokens, vocab]`."""
    dtype = arithmetic_dtype(how.config)
    product = "...th,vh->...tv" if how.transposed else "...th,hv->...tv"
    wide = jnp.promote_types(dtype, jnp.float32)
    logits = jnp.einsum(product, hidden, kernel, precision=how.precision, preferred_element_type=wide)
    logits = _constrain(logits, None, "vocab").astype(dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    return logits if how.soft_cap is None else jnp.tanh(logits / how.soft_cap) * how.soft_cap


def _measure(how: _How, logits: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """Return a chunk's sums, its log-partitions `[*groups, tokens]`, and where the targets are, as booleans."""
    counts = targets != how.config.ignore_index
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
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
    return _constrain(gradient, *(("vocab", None) if how.transposed else (None, "vocab")))


def _constrain(x: jax.Array, *roles: str | None) -> jax.Array:
    """Constrain an array whose last dimensions have these roles, those before them being the groups."""
    return constrain(x, *GROUPS[: x.ndim - len(roles)], *roles)


def _zeros() -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.float32(0), jnp.float32(0), jnp.int32(0)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)
