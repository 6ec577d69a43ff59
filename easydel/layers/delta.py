"""The gated delta rule (arXiv:2412.06464), for one token, and for many by chunks (its section 3.3).

    kept_t = exp(log_decay_t) · state_{t-1}
    state_t = kept_t + key_t ⊗ beta_t · (value_t - kept_tᵀ · key_t)        y_t = state_tᵀ · query_t

What a state gives for a key is replaced by the key's value, by a share of `beta`. A token whose `beta` and `log_decay`
are 0 leaves the state as it is: so padding is told. All arithmetic is float32.
Shapes: query and key `[batch, seq, groups, key_dim]`, value `[batch, seq, heads, value_dim]`, log_decay (not positive)
and beta `[batch, seq, heads]`, state `[batch, heads, key_dim, value_dim]`; `heads` is a multiple of `groups`. Keys
should be of length one at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easydel.layers.ssd import chunked, decays


def delta_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Take one token, shapes as above without `seq`; return y `[batch, heads, value_dim]` and the new state."""
    query, key, value, log_decay, beta = (x.astype(jnp.float32) for x in (query, key, value, log_decay, beta))
    query, key = (jnp.repeat(x, value.shape[1] // x.shape[1], axis=1) for x in (query, key))
    read = partial(jnp.einsum, "bhkv,bhk->bhv", precision=precision)
    kept = state * jnp.exp(log_decay)[..., None, None]
    written = beta[..., None] * (value - read(kept, key))
    state = kept + key[..., None] * written[:, :, None, :]
    return read(state, query), state


def delta_scan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    chunk_size: int = 64,
    segments: jax.Array | None = None,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Take any number of tokens, a chunk at a time: those of a chunk in parallel, by matrix products.

    A chunk costs memory in proportion to `chunk_size²`; only the states between chunks are kept for a backward pass.

    Args:
        query: as above, like `key` and `value`.
        key: what a token writes to and, before that, reads.
        value: what it writes there.
        log_decay: 0 where a place holds no token.
        beta: likewise.
        state: before the first token.
        chunk_size: tokens in a chunk; it changes the cost only.
        segments: int32 `[batch, seq]`, not decreasing, 0 for those that `state` belongs to; each of the others begins
            with a state of zeros.
        precision: of the matrix products.

    Returns:
        y `[batch, seq, heads, value_dim]` and the state after the last token.
    """
    (batch, length, heads, _), groups = value.shape, key.shape[2]
    size = max(1, min(chunk_size, length))
    query, key, value, log_decay, beta = (x.astype(jnp.float32) for x in (query, key, value, log_decay, beta))
    parts = _Chunk(
        query=chunked(query, size, groups)[:, :, :, 0],
        key=chunked(key, size, groups)[:, :, :, 0],
        value=chunked(value, size, groups),
        log_decay=chunked(log_decay[..., None], size, groups)[..., 0],
        beta=chunked(beta[..., None], size, groups)[..., 0],
        segments=None if segments is None else chunked(segments[..., None, None], size, 1)[:, :, 0, 0, :, 0],
    )
    first = (state.reshape(batch, groups, heads // groups, *state.shape[2:]), jnp.zeros((batch,), jnp.int32))
    body: Callable[..., Any] = jax.checkpoint(partial(_run_chunk, precision=precision), prevent_cse=False)
    (last, _), y = jax.lax.scan(body, first, parts)
    y = jnp.moveaxis(y, (0, 4), (1, 2))  # [chunks, batch, groups, heads of one, size, dim] -> batch, chunks, size, …
    return y.reshape(batch, -1, *value.shape[2:])[:, :length], last.reshape(state.shape)


class _Chunk(NamedTuple):
    """Chunks along the leading axis."""

    query: jax.Array  # [chunks, batch, groups, size, key_dim]
    key: jax.Array
    value: jax.Array  # [chunks, batch, groups, heads of a group, size, value_dim]
    log_decay: jax.Array  # [chunks, batch, groups, heads of a group, size]
    beta: jax.Array
    segments: jax.Array | None  # [chunks, batch, size]


def _run_chunk(carry: tuple[jax.Array, jax.Array], chunk: _Chunk, *, precision: Any) -> tuple[Any, jax.Array]:
    """Take one chunk; the carry is the state `[batch, groups, heads of a group, key_dim, value_dim]` and its segment.

    What tokens write, `w`, depends on what those before them wrote: `w_i + Σ_{j<i} L_ij w_j = beta_i · (value_i - what
    the state before the chunk gives)`, with `L_ij = beta_i · decay from j to i · key_i·key_j`.
    """
    einsum = partial(jnp.einsum, precision=precision)
    state, segment = carry
    reach, from_start, to_end, segment = decays(chunk.log_decay, chunk.segments, segment)

    def recalled(by: jax.Array) -> jax.Array:
        return einsum("bglk,bgrkv->bgrlv", by, state) * from_start[..., None]

    alike = einsum("bglk,bgsk->bgls", chunk.key, chunk.key)[:, :, None] * reach
    solve = unit_lower_inverse(jnp.tril(alike * chunk.beta[..., None], -1), precision=precision)
    written = einsum("bgrls,bgrsv->bgrlv", solve, chunk.beta[..., None] * (chunk.value - recalled(chunk.key)))
    weights = einsum("bglk,bgsk->bgls", chunk.query, chunk.key)[:, :, None] * reach
    y = recalled(chunk.query) + einsum("bgrls,bgrsv->bgrlv", weights, written)
    state = state * from_start[..., -1, None, None]
    return (state + einsum("bglk,bgrlv->bgrkv", chunk.key, written * to_end[..., None]), segment), y


def unit_lower_inverse(lower: jax.Array, *, precision: Any = None) -> jax.Array:
    """Return the inverse of `I + lower`, given a strictly lower triangular `[..., size, size]`.

    The inverses of blocks along the diagonal make those of blocks twice as large: `[[A, 0], [B, C]]` has the inverse
    `[[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]`. So it takes few matrix products, where substitution goes row by row, and its
    numbers stay as small, where powers of `lower` need not.
    """
    size, product = lower.shape[-1], partial(jnp.einsum, "...ij,...jk->...ik", precision=precision)
    inverse, width = jnp.eye(size, dtype=lower.dtype), 1
    while width < size:
        block = jnp.arange(size) // width
        corner = (block[:, None] == block[None, :] + 1) & (block[None, :] % 2 == 0)
        between = jnp.where(corner, lower, 0)
        inverse = inverse - (between if width == 1 else product(product(inverse, between), inverse))
        width *= 2
    return jnp.broadcast_to(inverse, lower.shape)
