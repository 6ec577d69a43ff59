"""The attention layer that families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from easydel.caching import AttentionCache, SlidingCache
from easydel.layers.attention.mechanisms import attend
from easydel.layers.linear import Linear, normal_init
from easydel.layers.rotary import rotate
from easydel.layers.stack import LayerInputs, LayerOutput
from easydel.sharding import constrain


class Attention(nnx.Module):
    """Self-attention with grouped heads, rotary positions and a cache.

    Args:
        hidden_size: size of the input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; must divide `num_heads`.
        head_dim: size of a head.
        qkv_bias: whether the q, k and v projections have a bias.
        out_bias: whether the output projection has one.
        scale: factor of the products; `head_dim ** -0.5` if `None`.
        causal: whether the layer looks back only; one that looks both ways keeps no cache. Who sees whom says the mask.
        window: how many positions a token sees, itself included; `None`: all before it.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        qk_norm: makes the norm that queries, and the one that keys pass per head before they are rotated.
        mechanism: how attention is computed (`config.attn_mechanism`).
        block_size: of the blockwise mechanism.
        dropout: rate of dropout on the attention weights; off until `train()` or `rngs`.
        init_stddev: of the initial weights.
        out_init_stddev: of those of the output projection, if different.

    Raises:
        ValueError: the heads do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        qk_norm: Callable[[], nnx.Module] | None = None,
        mechanism: str = "auto",
        block_size: int = 128,
        dropout: float = 0.0,
        init_stddev: float = 0.02,
        out_init_stddev: float | None = None,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}: each key/value head "
                "serves the same number of query heads"
            )

        def linear(features_in: int, features_out: int, use_bias: bool, stddev: float = init_stddev) -> Linear:
            return Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                kernel_init=normal_init(stddev),
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.q_proj = linear(hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        out_stddev = init_stddev if out_init_stddev is None else out_init_stddev
        self.o_proj = linear(num_heads * head_dim, hidden_size, out_bias, out_stddev)
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(), qk_norm()
        self.normalizes = qk_norm is not None
        self.dropout = nnx.Dropout(dropout, deterministic=True, rngs=rngs) if dropout else None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.causal, self.window, self.softcap = causal, window, softcap
        self.mechanism, self.block_size, self.precision = mechanism, block_size, precision

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> AttentionCache | SlidingCache | None:
        """Make this layer's empty cache: of the window's size, if there is one; none if later tokens count."""
        if not self.causal:
            return None
        if self.window is not None:
            return SlidingCache.create(batch_size, max_length, self.window, self.num_kv_heads, self.head_dim, dtype)
        return AttentionCache.create(batch_size, max_length, self.num_kv_heads, self.head_dim, dtype)

    def __call__(
        self, hidden: jax.Array, inputs: LayerInputs, cache: AttentionCache | SlidingCache | None
    ) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and (if asked for) the weights."""
        query, key, value = self._project(hidden, inputs)
        mask = inputs.mask
        if cache is not None:
            cache, key, value, mask = cache.extend(key, value, mask)
        active = self.dropout is not None and not self.dropout.deterministic
        out, weights = attend(
            query,
            key,
            value,
            mask.with_window(self.window),
            mechanism=self.mechanism,
            scale=self.scale,
            block_size=self.block_size,
            softcap=self.softcap,
            precision=self.precision,
            dropout=self.dropout if active else None,
            return_weights=inputs.output_attentions,
        )
        return LayerOutput(self.o_proj(out.reshape(*hidden.shape[:2], -1)), cache, weights)

    def _project(self, hidden: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return query, key and value, `[batch, seq, heads, head_dim]`, rotated."""

        def heads(x: jax.Array, count: int) -> jax.Array:
            return constrain(x.reshape(*hidden.shape[:2], count, self.head_dim), "batch", "sequence", "heads", None)

        query = heads(self.q_proj(hidden), self.num_heads)
        key = heads(self.k_proj(hidden), self.num_kv_heads)
        value = heads(self.v_proj(hidden), self.num_kv_heads)
        if self.normalizes:
            query, key = self.q_norm(query), self.k_norm(key)
        if inputs.rotary is not None:
            query, key = rotate(query, *inputs.rotary), rotate(key, *inputs.rotary)
        return query, key, value
