"""The recurrence of Mamba (arXiv:2312.00752, section 3.2), for one token, and for many by chunks.

    state_t = exp(dt_t · A) · state_{t-1} + dt_t · x_t · B_t        y_t = state_t · C_t

Each channel has a decay for each component of its state, so that no matrix product takes a chunk at once, as Mamba-2's
does. A token whose `dt` is 0 leaves the state as it is: so padding is told. All arithmetic is float32.
Shapes: x and dt `[batch, seq, channels]`, A (negative) `[channels, state_size]`, B and C `[batch, seq, state_size]`,
state `[batch, channels, state_size]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
"""Tokens of a chunk: in parallel it takes a few times `batch · 64 · channels · state_size` numbers at once."""


def selective_step(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Take one token, shapes as above without `seq`; return y `[batch, channels]` and the new state."""
    x, dt, A, B, C = (array.astype(jnp.float32) for array in (x, dt, A, B, C))
    state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
    return _read(state, C), state


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    *,
    segments: jax.Array | None = None,
    chunk_size: int = CHUNK,
    in_parallel: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Take any number of tokens, a chunk at a time; only the states between chunks are kept for a backward pass.

    Args:
        x: as above, like `dt`, `A`, `B` and `C`.
        dt: 0 where a place holds no token.
        A: negative.
        B: what a token writes.
        C: what a token reads.
        state: before the first token.
        segments: int32 `[batch, seq]`, not decreasing, 0 for those that `state` belongs to; each of the others begins
            with a state of zeros.
        chunk_size: tokens in a chunk; it changes the cost only.
        in_parallel: whether the states of a chunk are computed at once, by an associative scan of twice the arithmetic
            in a number of steps that is the chunk's logarithm. `None`: except on CPU, which has no use for so many
            threads and is faster token by token.

    Returns:
        y `[batch, seq, channels]` and the state after the last token.
    """
    length = x.shape[1]
    size = max(1, min(chunk_size, length))
    begins = None if segments is None else segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    # What fills up the last chunk has a dt of 0.
    x, dt, B, C = (_chunked(array.astype(jnp.float32), size) for array in (x, dt, B, C))
    parts = _Tokens(x, dt, B, C, None if begins is None else _chunked(begins, size))
    in_parallel = jax.default_backend() != "cpu" if in_parallel is None else in_parallel
    run: Callable[..., Any] = partial(_at_once if in_parallel else _by_token, A.astype(jnp.float32))
    last, y = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), state.astype(jnp.float32), parts)
    y = y.reshape(-1, *y.shape[2:])[:length]  # [chunks, size, batch, channels]
    return jnp.swapaxes(y, 0, 1), last


class _Tokens(NamedTuple):
    """Tokens along the leading axis, or chunks of them along the first two."""

    x: jax.Array  # [size, batch, channels]
    dt: jax.Array
    B: jax.Array  # [size, batch, state_size]
    C: jax.Array
    begins: jax.Array | None = None  # bool [size, batch], whether a token is the first of a segment

    def terms(self, A: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what the state is multiplied by and what is added to it, `[size, batch, channels, state_size]`."""
        decay = jnp.exp(self.dt[..., None] * A)
        if self.begins is not None:
            decay = jnp.where(self.begins[..., None, None], 0.0, decay)
        return decay, (self.dt * self.x)[..., None] * self.B[..., None, :]


def _by_token(A: jax.Array, state: jax.Array, chunk: _Tokens) -> tuple[jax.Array, jax.Array]:
    def step(state: jax.Array, token: _Tokens) -> tuple[jax.Array, jax.Array]:
        decay, written = token.terms(A)
        state = decay * state + written
        return state, _read(state, token.C)

    return jax.lax.scan(step, state, chunk)


def _at_once(A: jax.Array, state: jax.Array, chunk: _Tokens) -> tuple[jax.Array, jax.Array]:
    decay, written = chunk.terms(A)
    written = written.at[0].add(decay[0] * state)
    _, states = jax.lax.associative_scan(_both, (decay, written))
    return states[-1], _read(states, chunk.C)


def _both(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return what two steps `state → decay · state + written` come to, taken one after the other."""
    return one[0] * other[0], other[0] * one[1] + other[1]


def _read(states: jax.Array, C: jax.Array) -> jax.Array:
    """Return y `[…, channels]` of states `[…, channels, state_size]`; as a product it is some times faster on CPU."""
    return jnp.einsum("...cn,...n->...c", states, C, precision=jax.lax.Precision.HIGHEST)


def _chunked(array: jax.Array, size: int) -> jax.Array:
    """Map `[batch, seq, …]` to `[chunks, size, batch, …]`, filled up with zeros."""
    array = jnp.swapaxes(array, 0, 1)
    chunks = -(-array.shape[0] // size)
    array = jnp.pad(array, ((0, chunks * size - array.shape[0]), *((0, 0),) * (array.ndim - 1)))
    return array.reshape(chunks, size, *array.shape[1:])
