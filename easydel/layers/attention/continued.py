"""Attention of new tokens to one another and to what a cache holds, of which only the written part is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.masking import masked
from easydel.layers.attention.online import State, added, nothing, sink_column

LONG_CACHE = 4096
"""From so many slots on a single token, too, reads the written ones only: before, the loop costs more than it saves."""
BLOCK = {True: 1024, False: 512}
"""Slots that are read at once, by a single token and by several."""


def behind_a_cache(mask: AttentionMask, queries: int, keys: int) -> bool:
    """Whether `continued` is the better way: several tokens behind a cache, or one behind a long one."""
    if mask.own:
        return queries > 1
    one = queries == 1 and mask.offset is not None and mask.key_slots is None
    return one and keys >= LONG_CACHE and jax.default_backend() == "cpu"


def continued(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    precision: Any,
    block_size: int,
) -> jax.Array:
    """Compute attention by blocks: those of the queries' own keys that they see, then those of the cache in use.

    How many blocks of the cache are read is known only at run time, so it cannot be differentiated backwards.

    Args:
        query: `[batch, queries, heads, dim]`.
        key: `[batch, keys, kv_heads, dim]`: those of a cache, then the `mask.own` of the queries.
        value: likewise.
        mask: with an `offset`.
        scale: factor of the products.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        sinks: logits `[heads]` that take part in the softmax, or `None`.
        precision: of the products.
        block_size: queries per block, where they see one another.
    """
    batch, length, heads, dim = query.shape
    past = key.shape[1] - mask.own
    grouped = query.reshape(batch, length, key.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
    block = BLOCK[length == 1]
    block = past if past <= block or past % block else block
    offset = jnp.int32(0) if mask.offset is None else mask.offset
    written = jnp.minimum(offset + (0 if mask.own else length), past)

    def add(state: State | None, part: jax.Array, queries: range, start: Any, size: int) -> State:
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (key, value))
        products = jnp.einsum("bkgqd,btkd->bkgqt", part, keys, precision=precision, preferred_element_type=jnp.float32)
        of_block = mask.cut(start, size, key.shape[1])
        products = masked(products, of_block, queries, range(size), scale, softcap, None)
        return added(state, products, values, query.dtype, precision)

    column = sink_column(sinks, key.shape[2])
    if mask.own:
        blocks = [range(first, min(first + block_size, length)) for first in range(0, length, block_size)]
        parts = [(grouped[:, :, :, q.start : q.stop], q) for q in blocks]
        first = [None if column is None else nothing(part, value, column) for part, _ in parts]
        states = [add(seen, part, q, past, q.stop) for seen, (part, q) in zip(first, parts, strict=True)]
        state = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *states)
    else:
        state = nothing(grouped, value, column)
    _, total, out = jax.lax.fori_loop(
        0,
        (written + block - 1) // block,
        lambda place, state: add(state, grouped, range(length), place * block, block),
        state,
    )
    out = (out / total).astype(query.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, value.shape[-1])
