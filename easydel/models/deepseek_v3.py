"""DeepSeek-V3 (arXiv:2412.19437): latent attention, and experts balanced by a correction of their scores."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import GatedMLP, LatentAttention, PreNormBlock, latent_fields, mlp_fields
from easydel.models.experts import (
    MoEDecoder,
    behind_dense_layers,
    corrected_router,
    expert_rules,
    expert_weights,
    shared_and_routed,
)
from easydel.models.tasks import DecoderTokenClassifier, RoutedCausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("deepseek_v3")
class DeepseekV3Config(EasyDeLBaseConfig, transformers.DeepseekV3Config):
    """Fields of `transformers.DeepseekV3Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class DeepseekV3Block(PreNormBlock):
    """One layer, with experts or with an MLP."""

    def __init__(self, config: DeepseekV3Config, sparse: bool, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            LatentAttention(**latent_fields(config), interleaved=bool(config.rope_interleave), **options),
            shared_and_routed(config, corrected_router(config), use_bias=False, **options)
            if sparse
            else GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=DeepseekV3Config)
class DeepseekV3Model(MoEDecoder):
    """The DeepSeek-V3 backbone."""

    block_class = DeepseekV3Block
    layer_kinds = staticmethod(behind_dense_layers)
    weight_map = expert_weights()
    # Behind the last of 61 layers, files hold a module that predicts one more token.
    harmless_extras: ClassVar[tuple[str, ...]] = (*MoEDecoder.harmless_extras, r"(^|\.)layers\.61\.")


@register_module(TaskType.CAUSAL_LM, config=DeepseekV3Config)
class DeepseekV3ForCausalLM(RoutedCausalLM):
    """DeepSeek-V3 with a language-model head."""

    backbone_class = DeepseekV3Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=DeepseekV3Config)
class DeepseekV3ForSequenceClassification(SequenceClassifier):
    """DeepSeek-V3 with a classification head on the last token."""

    backbone_class = DeepseekV3Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=DeepseekV3Config)
class DeepseekV3ForTokenClassification(DecoderTokenClassifier):
    """DeepSeek-V3 with a classification head on every token."""

    backbone_class = DeepseekV3Model
