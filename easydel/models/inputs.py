"""What backbones do with their inputs before the first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from easydel.caching import Cache
from easydel.layers import AttentionMask


def extras_asked(config: Any, hidden_states: bool | None, attentions: bool | None) -> tuple[bool, bool]:
    """Return whether hidden states and attention weights are wanted; `None`: as the config says."""
    return (
        bool(config.output_hidden_states if hidden_states is None else hidden_states),
        bool(config.output_attentions if attentions is None else attentions),
    )


def embed_or_take(
    embed: Callable[[jax.Array], jax.Array],
    input_ids: jax.Array | None,
    inputs_embeds: jax.Array | None,
    dtype: Any,
    side: str = "",
) -> jax.Array:
    """Return the vectors `[batch, seq, hidden]` of the tokens, or those given in their place.

    Args:
        embed: int32 `[batch, seq]` → `[batch, seq, hidden]`.
        input_ids: int32 `[batch, seq]`.
        inputs_embeds: `[batch, seq, hidden]`.
        dtype: of the result.
        side: what the arguments' names begin with, for the errors.

    Raises:
        ValueError: neither or both are given, or the ids are of another shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"give either {side}input_ids or {side}inputs_embeds, got {got}")
    if inputs_embeds is not None:
        return jnp.asarray(inputs_embeds).astype(dtype)
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(f"{side}input_ids must be [batch, seq], got shape {ids.shape}")
    return embed(ids)


def place_tokens(
    attention_mask: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None, batch: int, length: int
) -> tuple[Cache | None, AttentionMask, jax.Array | None, jax.Array]:
    """Return the cache (its account extended), the mask, which places hold tokens, and the new tokens' positions."""
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
            raise ValueError(f"attention_mask must be [batch={batch}, seq={length}], got shape {attention_mask.shape}")
    if cache is not None:
        if segment_ids is not None:
            raise ValueError("segment_ids cannot be used with a cache: run packed sequences without one")
        offset = None if cache.is_empty else cache.index
        cache, tokens, positions = cache.extend(attention_mask, batch, length)
        return cache, AttentionMask(key_valid=cache.valid, offset=offset), tokens, positions

    if attention_mask is not None and attention_mask.shape[1] != length:
        raise ValueError(f"attention_mask of shape {attention_mask.shape} does not fit [batch={batch}, seq={length}]")
    valid = None if attention_mask is None else attention_mask.astype(bool)
    counted = jnp.ones((batch, length), jnp.int32) if valid is None else valid.astype(jnp.int32)
    running = jnp.cumsum(counted, axis=1)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        running = running - _before_segment(running - counted, segment_ids)
    mask = AttentionMask(key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)
    return None, mask, valid, jnp.maximum(running - 1, 0)


def _before_segment(before: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return, for each token, the number of tokens before its segment began, `[batch, seq]`."""
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(begins, before, 0), axis=1)


def shift_right(config: Any, ids: jax.Array) -> jax.Array:
    """Return the tokens `[batch, seq]` that a decoder is given to write `ids`: at each place the one before it.

    The first is `decoder_start_token_id`; where there is none (-100), `pad_token_id` stands for it.
    """
    start, pad = (token_of(config, name) for name in ("decoder_start_token_id", "pad_token_id"))
    ids = jnp.asarray(ids)
    shifted = jnp.concatenate([jnp.full_like(ids[:, :1], start), ids[:, :-1]], axis=1)
    return jnp.where(shifted == -100, pad, shifted)


def token_of(config: Any, name: str, *sources: Any) -> int:
    """Return a token id from the first of `sources` (the config alone, if none) that has it.

    Raises:
        ValueError: none has it.
    """
    for source in sources or (config,):
        if (value := getattr(source, name, None)) is not None:
            return int(value)
    raise ValueError(f"{type(config).__name__}.{name} is not set, so the decoder's first tokens are unknown; set it")
