"""Llama (arXiv:2302.13971, 2407.21783): pre-norm blocks, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, Embed, GatedMLP, LayerInputs, LayerStack, RMSNorm, RotaryEmbedding
from easydel.layers.linear import normal_init
from easydel.models.decoder import Decoder
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("llama")
class LlamaConfig(EasyDeLBaseConfig, transformers.LlamaConfig):
    """Fields of `transformers.LlamaConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split projections into heads and MLP over `tp`, the other side over `fsdp`."""
        return (
            (r"embed_tokens/embedding", PartitionSpec("tp", "fsdp")),
            (r"self_attn/(q|k|v)_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"self_attn/o_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"mlp/(gate|up)_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"mlp/down_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"lm_head/kernel", PartitionSpec("fsdp", "tp")),
            (r"score/kernel", PartitionSpec("fsdp", None)),
            (r"(q|k|v|gate|up)_proj/bias", PartitionSpec("tp")),
            (r"norm/scale|bias", PartitionSpec()),
        )


class LlamaBlock(nnx.Module):
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs) -> None:
        common = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        norm = {"epsilon": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            mechanism=config.attn_mechanism,
            block_size=config.attn_block_size,
            dropout=config.attention_dropout,
            init_stddev=config.initializer_range,
            **common,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            use_bias=config.mlp_bias,
            init_stddev=config.initializer_range,
            **common,
        )

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> tuple[jax.Array, Any, Any]:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        attended, cache, weights = self.self_attn(self.input_layernorm(hidden), inputs, cache)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), cache, weights


@register_module(TaskType.BASE, config=LlamaConfig)
class LlamaModel(Decoder):
    """The Llama backbone."""

    base_model_prefix = "model"
    harmless_extras = (r"rotary_emb\.inv_freq$",)

    def __init__(
        self,
        config: LlamaConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(config, dtype, param_dtype, precision, rngs)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=normal_init(config.initializer_range),
            precision=precision,
            rngs=rngs,
            **common,
        )
        blocks = range(config.num_hidden_layers)
        self.layers = LayerStack([LlamaBlock(config, precision=precision, rngs=rngs, **common) for _ in blocks])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **common)
        self.rotary = RotaryEmbedding(
            config.rope_parameters,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
        )


@register_module(TaskType.CAUSAL_LM, config=LlamaConfig)
class LlamaForCausalLM(CausalLM):
    """Llama with a language-model head."""

    backbone_class = LlamaModel
    harmless_extras = LlamaModel.harmless_extras


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=LlamaConfig)
class LlamaForSequenceClassification(SequenceClassifier):
    """Llama with a classification head on the last token."""

    backbone_class = LlamaModel
    harmless_extras = LlamaModel.harmless_extras
