"""Helium: Llama's block whose rotary positions turn neighbouring features, and no bias behind attention."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("helium")
class HeliumConfig(EasyDeLBaseConfig, transformers.HeliumConfig):
    """Fields of `transformers.HeliumConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class HeliumBlock(PreNormBlock):
    """One layer.

    Raises:
        ValueError: the heads together are not as wide as the model.
    """

    def __init__(self, config: HeliumConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        heads, size = config.num_attention_heads, config.head_dim
        if heads * size != config.hidden_size:
            raise ValueError(
                f"num_attention_heads={heads} of head_dim={size} must make up hidden_size={config.hidden_size}"
            )
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=config.attention_bias, interleaved=True, **options),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=HeliumConfig)
class HeliumModel(Decoder):
    """The Helium backbone."""

    block_class = HeliumBlock


@register_module(TaskType.CAUSAL_LM, config=HeliumConfig)
class HeliumForCausalLM(CausalLM):
    """Helium with a language-model head."""

    backbone_class = HeliumModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=HeliumConfig)
class HeliumForSequenceClassification(SequenceClassifier):
    """Helium with a classification head on the last token."""

    backbone_class = HeliumModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=HeliumConfig)
class HeliumForTokenClassification(DecoderTokenClassifier):
    """Helium with a classification head on every token."""

    backbone_class = HeliumModel
