"""Blocks that several families share, and the config fields that most of them read the same way."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from easydel.layers.attention import Attention
from easydel.layers.mlp import GatedMLP
from easydel.layers.moe import SparseMoE
from easydel.layers.norms import RMSNorm
from easydel.layers.stack import LayerInputs, LayerOutput


class PreNormBlock(nnx.Module):
    """Attention and MLP, each behind a norm and around a residual.

    Args:
        attention: the attention layer.
        mlp: the feed-forward layer, or a mixture of experts.
        hidden_size: size of the residual stream.
        epsilon: of the norms.
        dtype: of the norms' results.
        param_dtype: of the norms' scales.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP | SparseMoE,
        *,
        hidden_size: int,
        epsilon: float,
        dtype: Any,
        param_dtype: Any,
    ) -> None:
        norm = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = RMSNorm(hidden_size, **norm)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, **norm)
        self.mlp = mlp

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache, attention weights and router logits."""
        out = self.self_attn(self.input_layernorm(hidden), inputs, cache)
        hidden = hidden + out.hidden
        normed = self.post_attention_layernorm(hidden)
        if not isinstance(self.mlp, SparseMoE):
            return out.replace(hidden=hidden + self.mlp(normed))
        mixed, router_logits = self.mlp(normed)
        return out.replace(hidden=hidden + mixed, router_logits=router_logits)


def attention_fields(config: Any) -> dict[str, Any]:
    """Return the arguments of `Attention` that are the same fields in nearly every Hugging Face config."""
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
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
