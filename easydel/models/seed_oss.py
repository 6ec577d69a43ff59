"""Seed-OSS: Llama's block with biases of queries, keys and values, and dropout on what each layer adds."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("seed_oss")
class SeedOssConfig(EasyDeLBaseConfig, transformers.SeedOssConfig):
    """Fields of `transformers.SeedOssConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class SeedOssBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: SeedOssConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        inner, outer = config.attention_bias, config.attention_out_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=inner, out_bias=outer, **options),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dropout=(config.residual_dropout, config.residual_dropout),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=SeedOssConfig)
class SeedOssModel(Decoder):
    """The Seed-OSS backbone."""

    block_class = SeedOssBlock


@register_module(TaskType.CAUSAL_LM, config=SeedOssConfig)
class SeedOssForCausalLM(CausalLM):
    """Seed-OSS with a language-model head."""

    backbone_class = SeedOssModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=SeedOssConfig)
class SeedOssForSequenceClassification(SequenceClassifier):
    """Seed-OSS with a classification head on the last token."""

    backbone_class = SeedOssModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=SeedOssConfig)
class SeedOssForTokenClassification(DecoderTokenClassifier):
    """Seed-OSS with a classification head on every token."""

    backbone_class = SeedOssModel


@register_module(TaskType.QUESTION_ANSWERING, config=SeedOssConfig)
class SeedOssForQuestionAnswering(QuestionAnswering):
    """Seed-OSS with a head that marks the answer to a question."""

    backbone_class = SeedOssModel
    base_model_prefix = "transformer"
