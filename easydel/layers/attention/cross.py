"""Attention of a decoder to what an encoder made of its input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.caching import CrossAttentionCache
from easydel.layers.attention.layer import Attention
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.linear import project
from easydel.layers.stack import LayerInputs, LayerOutput


class CrossAttention(Attention):
    """Attention whose keys and values come from the encoder; it takes the arguments of `Attention`.

    With a cache they are computed once, at the first call, and kept.
    """

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> CrossAttentionCache:
        """Make this layer's empty cache; the encoder's states will say how large it gets."""
        del batch_size, max_length
        return CrossAttentionCache(is_quantized=jnp.dtype(dtype) == jnp.int8)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: CrossAttentionCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the filled cache and (if asked for) the weights."""
        kept = None if cache is None else cache.read(hidden.dtype)
        if cache is None or kept is None:
            if inputs.encoded is None:
                raise ValueError("cross-attention got neither the encoder's states nor a cache that holds them")
            key, value = self._keys_values(*project(inputs.encoded, self.k_proj, self.v_proj))
            valid = inputs.encoded_valid
            cache = None if cache is None else cache.filled(key, value, valid)
        else:
            (key, value), valid = kept, cache.valid
        mask = AttentionMask(key_valid=valid, causal=False)
        out, weights = self._attend(self._queries(self.q_proj(hidden)), key, value, mask, inputs.output_attentions)
        return LayerOutput(out, cache, weights)
