"""Qwen2 (arXiv:2407.10671): biases on queries, keys and values; a window in the upper layers if asked for."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("qwen2")
class Qwen2Config(EasyDeLBaseConfig, transformers.Qwen2Config):
    """Fields of `transformers.Qwen2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Qwen2Block(PreNormBlock):
    """One layer, full or sliding."""

    def __init__(self, config: Qwen2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=True, window=window_of(config, layer_type), **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Qwen2Config)
class Qwen2Model(Decoder):
    """The Qwen2 backbone."""

    block_class = Qwen2Block


@register_module(TaskType.CAUSAL_LM, config=Qwen2Config)
class Qwen2ForCausalLM(CausalLM):
    """Qwen2 with a language-model head."""

    backbone_class = Qwen2Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Qwen2Config)
class Qwen2ForSequenceClassification(SequenceClassifier):
    """Qwen2 with a classification head on the last token."""

    backbone_class = Qwen2Model
