"""Phi (arXiv:2306.11644, 2309.05463): attention and MLP side by side behind one LayerNorm; biases everywhere."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, PreNormBlock, attention_fields, layer_norm, make_dropout, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import BiasedCausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("phi")
class PhiConfig(EasyDeLBaseConfig, transformers.PhiConfig):
    """Fields of `transformers.PhiConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class PhiBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: PhiConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields = attention_fields(config)

        def head_norm() -> nnx.LayerNorm:
            return layer_norm(config.hidden_size // config.num_attention_heads, config.layer_norm_eps, **options)

        super().__init__(
            Attention(
                **fields, qkv_bias=True, out_bias=True, qk_norm=head_norm if config.qk_layernorm else None, **options
            ),
            MLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.layer_norm_eps,
            norm=layer_norm,
            parallel=True,
            dropout=(config.resid_pdrop, config.resid_pdrop),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=PhiConfig)
class PhiModel(Decoder):
    """The Phi backbone."""

    block_class = PhiBlock
    partial_rotary = True
    weight_map = (
        WeightRule("self_attn.dense", "self_attn/o_proj", None),
        WeightRule("self_attn.q_layernorm", "self_attn/q_norm", None),
        WeightRule("self_attn.k_layernorm", "self_attn/k_norm", None),
        WeightRule("mlp.fc1", "mlp/up_proj", None),
        WeightRule("mlp.fc2", "mlp/down_proj", None),
        WeightRule("final_layernorm", "norm", None),
    )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_eps, **self.dtypes)

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the dropout after the embeddings."""
        self.dropout = make_dropout(self.config.embd_pdrop, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Drop some of the embeddings' features."""
        del positions
        return self.dropout(hidden)


@register_module(TaskType.CAUSAL_LM, config=PhiConfig)
class PhiForCausalLM(BiasedCausalLM):
    """Phi with a language-model head."""

    backbone_class = PhiModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=PhiConfig)
class PhiForSequenceClassification(SequenceClassifier):
    """Phi with a classification head on the last token."""

    backbone_class = PhiModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=PhiConfig)
class PhiForTokenClassification(DecoderTokenClassifier):
    """Phi with a classification head on every token."""

    backbone_class = PhiModel
