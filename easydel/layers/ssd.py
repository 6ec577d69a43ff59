"""The recurrence of Mamba-2 (arXiv:2405.21060), for one token, and for many by chunks (its section 6).

    state_t = exp(dt_t · A) · state_{t-1} + dt_t · x_t ⊗ B_t        y_t = state_t · C_t

A token whose `dt` is 0 leaves the state as it is: so padding is told. All arithmetic is float32.
Shapes: x `[batch, seq, heads, head_dim]`, dt `[batch, seq, heads]`, A (negative) `[heads]`, B and C
`[batch, seq, groups, state_size]`, state `[batch, heads, head_dim, state_size]`; `heads` is a multiple of `groups`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_COARSE = 256.0
"""Sums of multiples of 1/256 are exact in float32 up to 65536."""


def ssd_step(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array, *, precision: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Take one token, shapes as above without `seq`; return y `[batch, heads, head_dim]` and the new state."""
    x, dt, B, C = (_wide(array) for array in (x, dt, B, C))
    B, C = (jnp.repeat(array, x.shape[1] // array.shape[1], axis=1) for array in (B, C))
    written = (dt[..., None] * x)[..., None] * B[:, :, None, :]
    state = state * jnp.exp(dt * _wide(A))[..., None, None] + written
    return jnp.einsum("bhpn,bhn->bhp", state, C, precision=precision), state


def ssd_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    *,
    chunk_size: int,
    segments: jax.Array | None = None,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Take any number of tokens, a chunk at a time: those of a chunk in parallel, by matrix products.

    A chunk costs memory in proportion to `chunk_size²`; only the states between chunks are kept for a backward pass.

    Args:
        x: as above, like `dt`, `A`, `B` and `C`.
        dt: 0 where a place holds no token.
        A: negative.
        B: what a token writes.
        C: what a token reads.
        state: before the first token.
        chunk_size: tokens in a chunk; it changes the cost only.
        segments: int32 `[batch, seq]`, not decreasing, 0 for those that `state` belongs to; each of the others begins
            with a state of zeros.
        precision: of the matrix products.

    Returns:
        y `[batch, seq, heads, head_dim]` and the state after the last token.
    """
    (batch, length, heads, dim), groups = x.shape, B.shape[2]
    size = max(1, min(chunk_size, length))
    dt = _wide(dt)
    parts = _Chunk(
        x=chunked(_wide(x) * dt[..., None], size, groups),
        log_decay=chunked((dt * _wide(A))[..., None], size, groups)[..., 0],
        B=chunked(_wide(B), size, groups)[:, :, :, 0],
        C=chunked(_wide(C), size, groups)[:, :, :, 0],
        segments=None if segments is None else chunked(segments[..., None, None], size, 1)[:, :, 0, 0, :, 0],
    )
    first = (state.reshape(batch, groups, heads // groups, dim, -1), jnp.zeros((batch,), jnp.int32))
    body: Callable[..., Any] = jax.checkpoint(partial(_run_chunk, precision=precision), prevent_cse=False)
    (last, _), y = jax.lax.scan(body, first, parts)
    y = jnp.moveaxis(y, (0, 4), (1, 2))  # [chunks, batch, groups, heads of one, size, dim] -> batch, chunks, size, …
    return y.reshape(batch, -1, heads, dim)[:, :length], last.reshape(state.shape)


class _Chunk(NamedTuple):
    """Chunks along the leading axis: x is times dt; `log_decay` is dt · A."""

    x: jax.Array  # [chunks, batch, groups, heads of a group, size, head_dim]
    log_decay: jax.Array  # [chunks, batch, groups, heads of a group, size]
    B: jax.Array  # [chunks, batch, groups, size, state_size]
    C: jax.Array
    segments: jax.Array | None  # [chunks, batch, size]


def _run_chunk(carry: tuple[jax.Array, jax.Array], chunk: _Chunk, *, precision: Any) -> tuple[Any, jax.Array]:
    """Take one chunk; the carry is the state `[batch, groups, heads of a group, dim, state_size]` and its segment."""
    einsum = partial(jnp.einsum, precision=precision)
    state, segment = carry
    reach, from_start, to_end, segment = decays(chunk.log_decay, chunk.segments, segment)
    weights = einsum("bgln,bgsn->bgls", chunk.C, chunk.B)[:, :, None] * reach
    y = einsum("bgrls,bgrsp->bgrlp", weights, chunk.x)
    y += einsum("bgln,bgrpn->bgrlp", chunk.C, state) * from_start[..., None]
    written = einsum("bgrsp,bgsn->bgrpn", chunk.x * to_end[..., None], chunk.B)
    return (state * from_start[..., -1, None, None] + written, segment), y


def decays(
    log_decay: jax.Array, segments: jax.Array | None, segment: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return what is left, in a chunk, of what a token wrote when another reads it.

    Args:
        log_decay: of each token, float32 `[batch, groups, heads of a group, size]`.
        segments: int `[batch, size]`, not decreasing, whose borders nothing passes; `None`: there are none.
        segment: of the state before the chunk, `[batch]`.

    Returns:
        From token to token, `[…, size, size]`, the reader first; from the state before the chunk to each token, and
        from each token to the state after it, `[…, size]`; and that state's segment.
    """
    coarse, fine = running_sums(log_decay)
    size = log_decay.shape[-1]
    earlier = jnp.tril(jnp.ones((size, size), bool))
    within = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    from_start, to_end = jnp.exp(coarse + fine), jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    if segments is not None:  # nothing passes a border
        earlier = (earlier & (segments[:, :, None] == segments[:, None, :]))[:, None, None]
        from_start *= (segments == segment[:, None])[:, None, None]
        segment = segments[:, -1]
        to_end *= (segments == segment[:, None])[:, None, None]
    return jnp.exp(jnp.where(earlier, within, -jnp.inf)), from_start, to_end, segment


def running_sums(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the running sums of the last axis in two parts, so that differences of large ones are exact.

    After a strong decay a single float32 sum is too large to hold the small decays that follow.
    """
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * _COARSE) / _COARSE)
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def chunked(array: jax.Array, size: int, groups: int) -> jax.Array:
    """Map `[batch, seq, heads, dim]` to `[chunks, batch, groups, heads / groups, size, dim]`, padded with its end."""
    batch, length, heads, dim = array.shape
    chunks = -(-length // size)
    mode = "edge" if array.dtype == jnp.int32 else "constant"  # segments go on, all else is 0
    array = jnp.pad(array, ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)), mode=mode)
    return array.reshape(batch, chunks, size, groups, heads // groups, dim).transpose(1, 0, 3, 4, 2, 5)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)
