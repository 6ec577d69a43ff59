"""The attention layer that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import AttentionCache, SlidingCache
from easydel.layers.attention.bias import AttentionBias
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.mechanisms import attend
from easydel.layers.linear import Linear, Spread, normal_init, project, stddev_of
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
        causal: whether a token sees only what comes before it; if not, there is no cache.
        window: how many positions a token sees, itself included, before it and, if not `causal`, as many after it;
            `None`: all.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        qk_norm: makes the norm that queries, and the one that keys pass before they are rotated; a pair of makers
            where the two differ.
        norm_per_head: whether these norms take each head by itself, `[batch, seq, heads, head_dim]`, or all heads of a
            token as one vector, `[batch, seq, heads * head_dim]`.
        clip: queries, keys and values are cut to `[-clip, clip]` before they are rotated; `None`: they are not.
        sinks: whether each query head has a learned logit that takes part in the softmax and stands for no token.
        gated: whether each head's result is multiplied by the sigmoid of a gate, one for each of its features, that
            `q_proj` gives behind the head's query.
        rotates: whether queries and keys are rotated where the model has rotary positions.
        interleaved: whether neighbouring features turn together, and not those half a head apart.
        mechanism: how attention is computed (`config.attn_mechanism`).
        block_size: of the blockwise mechanism.
        dropout: rate of dropout on the attention weights; off until `train()` or `rngs`.
        init_stddev: of the initial weights (or what draws them), all of them or by the name of the projection.

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
        qk_norm: Callable[[], nnx.Module] | tuple[Callable[[], nnx.Module], Callable[[], nnx.Module]] | None = None,
        norm_per_head: bool = True,
        clip: float | None = None,
        sinks: bool = False,
        gated: bool = False,
        rotates: bool = True,
        interleaved: bool = False,
        mechanism: str = "auto",
        block_size: int = 128,
        dropout: float = 0.0,
        init_stddev: Spread | Mapping[str, Spread] = 0.02,
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

        def linear(name: str, features_in: int, features_out: int, use_bias: bool) -> Linear:
            return Linear(
                features_in,
                features_out,
                roles=("heads", None) if name == "o_proj" else (None, "heads"),
                use_bias=use_bias,
                kernel_init=normal_init(stddev_of(init_stddev, name)),
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.q_proj = linear("q_proj", hidden_size, num_heads * head_dim * (2 if gated else 1), qkv_bias)
        self.k_proj = linear("k_proj", hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear("v_proj", hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear("o_proj", num_heads * head_dim, hidden_size, out_bias)
        if qk_norm is not None:
            makers = qk_norm if isinstance(qk_norm, tuple) else (qk_norm, qk_norm)
            self.q_norm, self.k_norm = (make() for make in makers)
        self.normalizes, self.norm_per_head, self.rotates = qk_norm is not None, norm_per_head, rotates
        if sinks:
            initial = normal_init(stddev_of(init_stddev, "sinks"))
            self.sinks = nnx.Param(initial(rngs.params(), (num_heads,), param_dtype))
        self.clip, self.has_sinks, self.interleaved, self.gated = clip, sinks, interleaved, gated
        self.dropout = nnx.Dropout(dropout, deterministic=True, rngs=rngs) if dropout else None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.causal, self.window, self.softcap = causal, window, softcap
        self.mechanism, self.block_size, self.precision = mechanism, block_size, precision

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> Any:
        """Make this layer's empty cache: of the window's size, if there is one; `None` if it is not causal."""
        if not self.causal:
            return None
        if self.window is not None:
            return SlidingCache.create(batch_size, max_length, self.window, self.num_kv_heads, self.head_dim, dtype)
        return AttentionCache.create(batch_size, max_length, self.num_kv_heads, self.head_dim, dtype)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and (if asked for) the weights."""
        projected = project(hidden, self.q_proj, self.k_proj, self.v_proj)
        queries, gate = self._parted(projected[0]) if self.gated else (projected[0], None)
        query, key, value = self._queries(queries), *self._keys_values(*projected[1:])
        if inputs.rotary is not None and self.rotates:
            query, key = (rotate(x, *inputs.rotary, interleaved=self.interleaved) for x in (query, key))
        mask = inputs.mask if self.causal else replace(inputs.mask, causal=False)
        if cache is not None:
            cache, key, value, mask = cache.extend(key, value, mask)
        mask = mask.with_window(self.window)
        out, weights = self._attend(query, key, value, mask, inputs.output_attentions, inputs.bias, gate)
        return LayerOutput(out, cache, weights)

    def _parted(self, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the queries and the gates of all heads, `[batch, seq, heads * head_dim]`."""
        heads = projected.reshape(*projected.shape[:2], self.num_heads, 2 * self.head_dim)
        query, gate = jnp.split(constrain(heads, "batch", "sequence", "heads", None), 2, axis=-1)
        return query.reshape(*projected.shape[:2], -1), gate.reshape(*projected.shape[:2], -1)

    def _queries(self, projected: jax.Array) -> jax.Array:
        """Return the queries, `[batch, seq, heads, head_dim]`, not rotated yet."""
        return self._normed(projected, self.num_heads, self.q_norm if self.normalizes else None)

    def _keys_values(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what was projected as keys and values, `[batch, seq, kv_heads, head_dim]`, not rotated yet."""
        key = self._normed(keys, self.num_kv_heads, self.k_norm if self.normalizes else None)
        return key, self._clipped(self._heads(values, self.num_kv_heads))

    def _normed(self, x: jax.Array, count: int, norm: nnx.Module | None) -> jax.Array:
        if norm is None:
            return self._clipped(self._heads(x, count))
        normed = norm(self._heads(x, count)) if self.norm_per_head else self._heads(norm(x), count)
        return self._clipped(normed)

    def _clipped(self, x: jax.Array) -> jax.Array:
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)

    def _heads(self, x: jax.Array, count: int) -> jax.Array:
        return constrain(x.reshape(*x.shape[:2], count, self.head_dim), "batch", "sequence", "heads", None)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: AttentionMask,
        return_weights: bool,
        bias: AttentionBias | None = None,
        gate: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the projected result, `[batch, seq, hidden]`, and (if asked for) the weights."""
        active = self.dropout is not None and not self.dropout.deterministic
        out, weights = attend(
            query,
            key,
            value,
            mask,
            mechanism=self.mechanism,
            scale=self.scale,
            block_size=self.block_size,
            softcap=self.softcap,
            bias=bias,
            sinks=self.sinks.get_value() if self.has_sinks else None,
            precision=self.precision,
            dropout=self.dropout if active else None,
            return_weights=return_weights,
        )
        out = out.reshape(*query.shape[:2], -1)
        return self.o_proj(out if gate is None else out * jax.nn.sigmoid(gate)), weights
