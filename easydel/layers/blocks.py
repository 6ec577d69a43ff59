"""Blocks that several families share, and the config fields that most of them read the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.layers.attention import Attention
from easydel.layers.dropout import make_dropout
from easydel.layers.mlp import MLP, GatedMLP
from easydel.layers.moe import SparseMoE
from easydel.layers.norms import RMSNorm
from easydel.layers.rotary import attention_magnitude
from easydel.layers.stack import LayerInputs, LayerOutput


class PreNormBlock(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual; or both behind one norm and around one residual.

    Args:
        attention: the attention layer, or another that mixes tokens.
        mlp: the feed-forward layer, or a mixture of experts.
        hidden_size: size of the residual stream.
        epsilon: of the norms.
        norm: makes a norm, `norm(hidden_size, epsilon=…, dtype=…, param_dtype=…)`.
        parallel: whether the MLP is given what attention is given, and both are added to the stream at once.
        two_norms: whether the MLP beside attention (`parallel`) has a norm of its own.
        name: of the layer that mixes tokens, in the tree of parameters.
        residual_scale: what attention's and the MLP's results are multiplied by before they are added.
        dropout: rates of dropout on what attention and on what the MLP adds; off until `train()` or `rngs`.
        dtype: of the norms' results.
        param_dtype: of the norms' scales.
        rngs: the keys of dropout; needed where a rate is not 0.
    """

    def __init__(
        self,
        attention: nnx.Module,
        mlp: MLP | GatedMLP | SparseMoE,
        *,
        hidden_size: int,
        epsilon: float,
        norm: Callable[..., nnx.Module] = RMSNorm,
        parallel: bool = False,
        two_norms: bool = False,
        name: str = "self_attn",
        residual_scale: float = 1.0,
        dropout: tuple[float, float] = (0.0, 0.0),
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        options = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = norm(hidden_size, **options)
        setattr(self, name, attention)
        self.mixer_name = name
        self.post_attention_layernorm = None if parallel and not two_norms else norm(hidden_size, **options)
        self.parallel = parallel
        self.mlp = mlp
        self.attention_dropout, self.mlp_dropout = (make_dropout(rate, rngs) if rate else None for rate in dropout)
        self.residual_scale = residual_scale

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache, attention weights and router logits."""
        normed, before = self.input_layernorm(hidden), hidden
        out = getattr(self, self.mixer_name)(normed, inputs, cache)
        hidden = hidden + self._added(out.hidden, self.attention_dropout)
        if self.post_attention_layernorm is not None:
            normed = self.post_attention_layernorm(before if self.parallel else hidden)
        if isinstance(self.mlp, SparseMoE):
            mixed, router_logits = self.mlp(normed)
            out = out.replace(router_logits=router_logits)
        else:
            mixed = self.mlp(normed)
        return out.replace(hidden=hidden + self._added(mixed, self.mlp_dropout))

    def _added(self, x: jax.Array, dropout: nnx.Dropout | None) -> jax.Array:
        x = x if dropout is None else dropout(x)
        return x if self.residual_scale == 1.0 else x * self.residual_scale


class SandwichBlock(nnx.Module):
    """Attention and MLP around residuals; what each adds is normed, and so, as a rule, is what each is given.

    Args:
        attention: the attention layer.
        mlp: the feed-forward layer.
        hidden_size: size of the residual stream.
        epsilon: of the norms.
        norm: makes a norm, `norm(hidden_size, epsilon=…, dtype=…, param_dtype=…)`.
        before: whether there are norms before attention and MLP, too.
        dtype: of the norms' results.
        param_dtype: of the norms' scales.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: MLP | GatedMLP,
        *,
        hidden_size: int,
        epsilon: float,
        norm: Callable[..., nnx.Module] = RMSNorm,
        before: bool = True,
        dtype: Any,
        param_dtype: Any,
    ) -> None:
        options = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = norm(hidden_size, **options) if before else None
        self.self_attn = attention
        self.post_attention_layernorm = norm(hidden_size, **options)
        self.pre_feedforward_layernorm = norm(hidden_size, **options) if before else None
        self.mlp = mlp
        self.post_feedforward_layernorm = norm(hidden_size, **options)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        given = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        out = self.self_attn(given, inputs, cache)
        hidden = hidden + self.post_attention_layernorm(out.hidden)
        given = hidden if self.pre_feedforward_layernorm is None else self.pre_feedforward_layernorm(hidden)
        return out.replace(hidden=hidden + self.post_feedforward_layernorm(self.mlp(given)))


def attention_fields(config: Any) -> dict[str, Any]:
    """Return the arguments of `Attention` that are the same fields in nearly every Hugging Face config."""
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "mechanism": config.attn_mechanism,
        "block_size": config.attn_block_size,
        "dropout": getattr(config, "attention_dropout", None) or 0.0,
        "init_stddev": config.initializer_range,
    }


def head_size(hidden_size: int, num_heads: int) -> int:
    """Return the size of a head where heads share the hidden size.

    Raises:
        ValueError: they cannot.
    """
    if hidden_size % num_heads:
        raise ValueError(f"num_attention_heads={num_heads} must divide hidden_size={hidden_size}")
    return hidden_size // num_heads


def latent_fields(config: Any) -> dict[str, Any]:
    """Return the arguments of `LatentAttention` that DeepSeek's configs, and those made like them, have as fields.

    Raises:
        UnsupportedError: keys and values have other heads than queries.
        ValueError: the scaled rotary positions lack a factor.
    """
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedError(
            f"num_key_value_heads={config.num_key_value_heads} is not supported: latents are made into keys and values "
            f"of every head, num_attention_heads={config.num_attention_heads}"
        )
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "query_rank": config.q_lora_rank,
        "latent_rank": config.kv_lora_rank,
        "plain_dim": config.qk_nope_head_dim,
        "rotary_dim": config.qk_rope_head_dim,
        "value_dim": config.v_head_dim,
        "use_bias": config.attention_bias,
        "magnitude": attention_magnitude(config.rope_parameters),
        "mechanism": config.attn_mechanism,
        "block_size": config.attn_block_size,
        "dropout": config.attention_dropout or 0.0,
        "init_stddev": config.initializer_range,
    }


def mlp_fields(config: Any) -> dict[str, Any]:
    """Return the arguments of `GatedMLP` that are the same fields in nearly every Hugging Face config."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "act": config.hidden_act,
        "init_stddev": config.initializer_range,
    }
