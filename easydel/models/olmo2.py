"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, none before; queries and keys normalised over all heads."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, RMSNorm, SandwichBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("olmo2")
class Olmo2Config(EasyDeLBaseConfig, transformers.Olmo2Config):
    """Fields of `transformers.Olmo2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Olmo2Block(SandwichBlock):
    """One layer: what attention and what the MLP adds is normalised."""

    def __init__(self, config: Olmo2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, bias = attention_fields(config), config.attention_bias

        def norm(heads: int) -> RMSNorm:
            width = heads * fields["head_dim"]
            return RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        super().__init__(
            Attention(
                **fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=(lambda: norm(fields["num_heads"]), lambda: norm(fields["num_kv_heads"])),
                norm_per_head=False,
                **options,
            ),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            before=False,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Olmo2Config)
class Olmo2Model(Decoder):
    """The OLMo 2 backbone."""

    block_class = Olmo2Block


@register_module(TaskType.CAUSAL_LM, config=Olmo2Config)
class Olmo2ForCausalLM(CausalLM):
    """OLMo 2 with a language-model head."""

    backbone_class = Olmo2Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Olmo2Config)
class Olmo2ForSequenceClassification(SequenceClassifier):
    """OLMo 2 with a classification head on the last token."""

    backbone_class = Olmo2Model
