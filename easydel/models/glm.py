"""GLM-4 9B (arXiv:2406.12793): Llama's block with neighbouring features of half of each head rotated."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.hub.weight_map import TRANSPOSE, Split, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("glm")
class GlmConfig(EasyDeLBaseConfig, transformers.GlmConfig):
    """Fields of `transformers.GlmConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GlmBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: GlmConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=config.attention_bias, interleaved=True, **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=GlmConfig)
class GlmModel(Decoder):
    """The GLM backbone."""

    block_class = GlmBlock
    partial_rotary = True
    weight_map = (
        WeightRule("mlp.gate_up_proj.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), Split(0, TRANSPOSE)),
    )


@register_module(TaskType.CAUSAL_LM, config=GlmConfig)
class GlmForCausalLM(CausalLM):
    """GLM with a language-model head."""

    backbone_class = GlmModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GlmConfig)
class GlmForSequenceClassification(SequenceClassifier):
    """GLM with a classification head on the last token."""

    backbone_class = GlmModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=GlmConfig)
class GlmForTokenClassification(DecoderTokenClassifier):
    """GLM with a classification head on every token."""

    backbone_class = GlmModel
