"""Qwen3 (arXiv:2505.09388): queries and keys are normalised per head."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, RMSNorm, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("qwen3")
class Qwen3Config(EasyDeLBaseConfig, transformers.Qwen3Config):
    """Fields of `transformers.Qwen3Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Qwen3Block(PreNormBlock):
    """One layer, full or sliding."""

    def __init__(self, config: Qwen3Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias

        def head_norm() -> RMSNorm:
            return RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        window = window_of(config, layer_type)
        super().__init__(
            Attention(
                **attention_fields(config), qkv_bias=bias, out_bias=bias, window=window, qk_norm=head_norm, **options
            ),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Qwen3Config)
class Qwen3Model(Decoder):
    """The Qwen3 backbone."""

    block_class = Qwen3Block


@register_module(TaskType.CAUSAL_LM, config=Qwen3Config)
class Qwen3ForCausalLM(CausalLM):
    """Qwen3 with a language-model head."""

    backbone_class = Qwen3Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Qwen3Config)
class Qwen3ForSequenceClassification(SequenceClassifier):
    """Qwen3 with a classification head on the last token."""

    backbone_class = Qwen3Model
