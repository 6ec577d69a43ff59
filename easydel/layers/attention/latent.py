"""Multi-head latent attention: keys and values of all heads are made from one small vector a token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import LatentCache
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.mechanisms import attend
from easydel.layers.linear import Linear, normal_init, project
from easydel.layers.norms import RMSNorm
from easydel.layers.rotary import rotate
from easydel.layers.stack import LayerInputs, LayerOutput
from easydel.sharding import constrain

EPSILON = 1e-6
"""Of the norms inside, whatever the model's others have."""


class LatentAttention(nnx.Module):
    """Self-attention that keeps a latent instead of keys and values (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A head's key is a plain part, made from the latent, and a rotated part, which all heads share; its value is made
    from the latent. The cache holds latent and rotated part: `latent_rank + rotary_dim` numbers a token.

    What is made from latents is made in one of two forms that give the same numbers. Expanded: `kv_b_proj` makes keys
    and values of all tokens. Absorbed: products `q · (W c)` are computed as `(Wᵀ q) · c`, and values are made of the
    weighted sum of latents, so that the latents serve as the keys and values of a single head. A few tokens behind a
    cache cost least absorbed (`absorbs`); all others are computed expanded.

    Args:
        hidden_size: size of the input and output.
        num_heads: heads.
        query_rank: size of the vector that queries are made from; `None`: they are projected directly.
        latent_rank: size of the latent.
        plain_dim: size of the part of a query or key that is not rotated.
        rotary_dim: size of the part that is.
        value_dim: size of a value.
        use_bias: whether the projections from and to the residual stream have a bias, but for that of direct queries.
        magnitude: factor of the products, besides `(plain_dim + rotary_dim) ** -0.5`.
        interleaved: whether neighbouring features turn together, and not those half of `rotary_dim` apart.
        mechanism: how attention is computed (`config.attn_mechanism`).
        block_size: of the blockwise mechanism.
        dropout: rate of dropout on the attention weights; off until `train()` or `rngs`.
        init_stddev: of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        query_rank: int | None,
        latent_rank: int,
        plain_dim: int,
        rotary_dim: int,
        value_dim: int,
        use_bias: bool = False,
        magnitude: float = 1.0,
        interleaved: bool = True,
        mechanism: str = "auto",
        block_size: int = 128,
        dropout: float = 0.0,
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        options: dict[str, Any] = dtypes | {"precision": precision, "rngs": rngs}
        options["kernel_init"] = normal_init(init_stddev)
        whole, by_heads = (None, None), (None, "heads")
        queries = num_heads * (plain_dim + rotary_dim)
        if query_rank is None:
            self.q_proj = Linear(hidden_size, queries, roles=by_heads, use_bias=False, **options)
        else:
            self.q_a_proj = Linear(hidden_size, query_rank, roles=whole, use_bias=use_bias, **options)
            self.q_a_layernorm = RMSNorm(query_rank, epsilon=EPSILON, **dtypes)
            self.q_b_proj = Linear(query_rank, queries, roles=by_heads, use_bias=False, **options)
        # The names are those of DeepSeek's checkpoints; "mqa": the rotated part is one for all heads.
        self.kv_a_proj_with_mqa = Linear(
            hidden_size, latent_rank + rotary_dim, roles=whole, use_bias=use_bias, **options
        )
        self.kv_a_layernorm = RMSNorm(latent_rank, epsilon=EPSILON, **dtypes)
        made = num_heads * (plain_dim + value_dim)
        self.kv_b_proj = Linear(latent_rank, made, roles=by_heads, use_bias=False, **options)
        self.o_proj = Linear(num_heads * value_dim, hidden_size, roles=("heads", None), use_bias=use_bias, **options)
        self.dropout = nnx.Dropout(dropout, deterministic=True, rngs=rngs) if dropout else None
        self.num_heads, self.latent_rank, self.has_query_rank = num_heads, latent_rank, query_rank is not None
        self.plain_dim, self.rotary_dim, self.value_dim = plain_dim, rotary_dim, value_dim
        self.scale, self.interleaved = magnitude * (plain_dim + rotary_dim) ** -0.5, interleaved
        self.mechanism, self.block_size, self.precision = mechanism, block_size, precision

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> LatentCache:
        """Make this layer's empty cache."""
        return LatentCache.create(batch_size, max_length, self.latent_rank, self.rotary_dim, dtype)

    def absorbs(self, queries: int) -> bool:
        """Whether so many tokens behind a cache cost less absorbed: fewer products for each token that they see."""
        expanded = self.plain_dim + self.rotary_dim + self.value_dim
        absorbed = 2 * (self.latent_rank + self.rotary_dim)
        return queries * (absorbed - expanded) < self.latent_rank * (self.plain_dim + self.value_dim)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: LatentCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and (if asked for) the weights."""
        query, states = self._projected(hidden, inputs.rotary)
        mask = inputs.mask
        if cache is not None:
            cache, states, mask = cache.extend(states, mask)
        behind = mask.offset is not None and self.absorbs(hidden.shape[1])
        out, weights = (self._absorbed if behind else self._expanded)(query, states, mask, inputs)
        return LayerOutput(self.o_proj(out.reshape(*hidden.shape[:2], -1)), cache, weights)

    def _projected(self, hidden: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array]:
        """Return queries `[batch, seq, heads, plain + rotary]` and states `[batch, seq, 1, latent + rotary]`."""
        first = self.q_a_proj if self.has_query_rank else self.q_proj
        queries, states = project(hidden, first, self.kv_a_proj_with_mqa)
        if self.has_query_rank:
            queries = self.q_b_proj(self.q_a_layernorm(queries))
        plain, turned = jnp.split(self._by_heads(queries), [self.plain_dim], axis=-1)
        latent, shared = jnp.split(states[:, :, None], [self.latent_rank], axis=-1)
        if rotary is not None:
            turned, shared = (rotate(x, *rotary, interleaved=self.interleaved) for x in (turned, shared))
        query = jnp.concatenate([plain, turned], axis=-1)
        return query, jnp.concatenate([self.kv_a_layernorm(latent), shared], axis=-1)

    def _expanded(
        self, query: jax.Array, states: jax.Array, mask: AttentionMask, inputs: LayerInputs
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return results `[batch, seq, heads, value]`, keys and values of all heads made from states."""
        latent, shared = jnp.split(states, [self.latent_rank], axis=-1)
        plain, value = jnp.split(self._by_heads(self.kv_b_proj(latent[:, :, 0])), [self.plain_dim], axis=-1)
        shared = jnp.broadcast_to(shared, (*plain.shape[:-1], self.rotary_dim))
        return self._attend(query, jnp.concatenate([plain, shared], axis=-1), value, mask, inputs)

    def _absorbed(
        self, query: jax.Array, states: jax.Array, mask: AttentionMask, inputs: LayerInputs
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return results `[batch, seq, heads, value]`, states being keys and values of one head.

        The states are taken as values whole, that nothing is copied; what they say of positions is cut off.
        """
        of_keys, of_values = jnp.split(self._matrix(query), [self.plain_dim], axis=-1)
        plain, turned = jnp.split(query, [self.plain_dim], axis=-1)
        inside = jnp.einsum("bqhd,rhd->bqhr", plain, of_keys, precision=self.precision)
        out, weights = self._attend(jnp.concatenate([inside, turned], axis=-1), states, states, mask, inputs)
        latent = out[..., : self.latent_rank]
        return jnp.einsum("bqhr,rhd->bqhd", latent, of_values, precision=self.precision), weights

    def _matrix(self, query: jax.Array) -> jax.Array:
        """Return what makes keys and values from latents, `[latent, heads, plain + value]`."""
        layer: Any = self.kv_b_proj
        if type(layer) is Linear:
            matrix = layer.operands(query[:, :, 0])[1]  # of what it is given, batch and dtype matter here
        else:
            # What stands in its place, with codes or an adapter: its matrix is what it makes of unit vectors. Where
            # that rounds inputs, too, it does not round these, and latents meet the matrix as they are.
            matrix = layer(jnp.eye(self.latent_rank, dtype=query.dtype))
        return matrix.reshape(self.latent_rank, self.num_heads, -1)

    def _by_heads(self, x: jax.Array) -> jax.Array:
        return constrain(x.reshape(*x.shape[:2], self.num_heads, -1), "batch", "sequence", "heads", None)

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, inputs: LayerInputs
    ) -> tuple[jax.Array, jax.Array | None]:
        active = self.dropout is not None and not self.dropout.deterministic
        return attend(
            query,
            key,
            value,
            mask,
            mechanism=self.mechanism,
            scale=self.scale,
            block_size=self.block_size,
            bias=inputs.bias,
            precision=self.precision,
            dropout=self.dropout if active else None,
            return_weights=inputs.output_attentions,
        )
