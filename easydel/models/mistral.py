"""Mistral (arXiv:2310.06825): Llama's block with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("mistral")
class MistralConfig(EasyDeLBaseConfig, transformers.MistralConfig):
    """Fields of `transformers.MistralConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class MistralBlock(PreNormBlock):
    """One layer; all have the same window, whatever `layer_types` says."""

    def __init__(self, config: MistralConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        del layer_type  # all layers are alike
        super().__init__(
            Attention(**attention_fields(config), window=config.sliding_window, **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=MistralConfig)
class MistralModel(Decoder):
    """The Mistral backbone."""

    block_class = MistralBlock


@register_module(TaskType.CAUSAL_LM, config=MistralConfig)
class MistralForCausalLM(CausalLM):
    """Mistral with a language-model head."""

    backbone_class = MistralModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=MistralConfig)
class MistralForSequenceClassification(SequenceClassifier):
    """Mistral with a classification head on the last token."""

    backbone_class = MistralModel
