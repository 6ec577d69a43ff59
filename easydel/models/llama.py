"""Llama (arXiv:2302.13971, 2407.21783): pre-norm blocks, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("llama")
class LlamaConfig(EasyDeLBaseConfig, transformers.LlamaConfig):
    """Fields of `transformers.LlamaConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class LlamaBlock(PreNormBlock):
    """One layer; biases everywhere or nowhere."""

    def __init__(self, config: LlamaConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=LlamaConfig)
class LlamaModel(Decoder):
    """The Llama backbone."""

    block_class = LlamaBlock


@register_module(TaskType.CAUSAL_LM, config=LlamaConfig)
class LlamaForCausalLM(CausalLM):
    """Llama with a language-model head."""

    backbone_class = LlamaModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=LlamaConfig)
class LlamaForSequenceClassification(SequenceClassifier):
    """Llama with a classification head on the last token."""

    backbone_class = LlamaModel
