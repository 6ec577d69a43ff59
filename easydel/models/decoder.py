"""The forward pass of a decoder-only backbone, for every family that is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.caching import Cache
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.layers import AttentionMask, Embed, LayerInputs, LayerStack
from easydel.outputs import BaseModelOutput


class Decoder(EasyDeLBaseModule):
    """Embeddings, a stack of blocks and a final norm.

    A family's `__init__` sets `embed_tokens`, `layers`, `norm` and `rotary`.
    """

    embed_tokens: Embed
    layers: LayerStack
    norm: Any
    rotary: Any

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """Run the backbone.

        Args:
            input_ids: int32 `[batch, seq]`.
            attention_mask: 0 where a token is padding, `[batch, seq]`.
            position_ids: int32 `[batch, seq]`; the running count of tokens if `None`, anew in each segment.
            inputs_embeds: `[batch, seq, hidden]`, in place of `input_ids`.
            segment_ids: int32 `[batch, seq]`; tokens see only their own segment.
            cache: from `init_operations_cache`, or an earlier output.
            output_hidden_states: also return the embeddings and each layer's output.
            output_attentions: also return the attention weights.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or shapes that do not fit.
        """
        hidden = self._embedded(input_ids, inputs_embeds)
        batch, length = hidden.shape[:2]
        cache, mask, positions = place_tokens(attention_mask, segment_ids, cache, batch, length)
        positions = positions if position_ids is None else jnp.broadcast_to(jnp.asarray(position_ids), (batch, length))
        inputs = LayerInputs(
            rotary=self.rotary(positions, self.dtype),
            mask=mask,
            index=mask.offset,
            output_attentions=output_attentions,
        )
        remat = self.config.gradient_checkpointing
        out = self.layers.run(hidden, inputs, None if cache is None else cache.layers, remat)
        hidden = self.norm(out.hidden)
        return BaseModelOutput(
            last_hidden_state=hidden,
            cache=None if cache is None else cache.with_layers(out.caches or ()),
            hidden_states=(*out.hidden_states, hidden) if output_hidden_states else None,
            attentions=out.attentions if output_attentions else None,
        )

    def _embedded(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, got {got}")
        if inputs_embeds is not None:
            return jnp.asarray(inputs_embeds).astype(self.dtype)
        ids = jnp.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, seq], got shape {ids.shape}")
        return self.embed_tokens(ids)


def place_tokens(
    attention_mask: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None, batch: int, length: int
) -> tuple[Cache | None, AttentionMask, jax.Array]:
    """Return the cache (its account extended), the attention mask and the positions of new tokens."""
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
            raise ValueError(f"attention_mask must be [batch={batch}, seq={length}], got shape {attention_mask.shape}")
    if cache is not None:
        if segment_ids is not None:
            raise ValueError("segment_ids cannot be used with a cache: run packed sequences without one")
        offset = cache.index
        cache, _, positions = cache.extend(attention_mask, batch, length)
        return cache, AttentionMask(key_valid=cache.valid, offset=offset), positions

    if attention_mask is not None and attention_mask.shape[1] != length:
        raise ValueError(f"attention_mask of shape {attention_mask.shape} does not fit [batch={batch}, seq={length}]")
    valid = None if attention_mask is None else attention_mask.astype(bool)
    counted = jnp.ones((batch, length), jnp.int32) if valid is None else valid.astype(jnp.int32)
    running = jnp.cumsum(counted, axis=1)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        running = running - _before_segment(running - counted, segment_ids)
    mask = AttentionMask(key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)
    return None, mask, jnp.maximum(running - 1, 0)


def _before_segment(before: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return, for each token, the number of tokens before its segment began, `[batch, seq]`."""
    begins = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
