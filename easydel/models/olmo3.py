"""OLMo 3 (arXiv:2512.13961): OLMo 2 with sliding layers; each kind of layer has a rotation of its own."""

from __future__ import annotations

from typing import Any

import jax
import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedMLP,
    LayerInputs,
    LayerOutput,
    RMSNorm,
    SandwichBlock,
    attention_fields,
    mlp_fields,
)
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("olmo3")
class Olmo3Config(EasyDeLBaseConfig, transformers.Olmo3Config):
    """Fields of `transformers.Olmo3Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Olmo3Block(SandwichBlock):
    """One layer, full or sliding: what attention and what the MLP adds is normalised; rotated as its kind says."""

    def __init__(self, config: Olmo3Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
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
                window=window_of(config, layer_type),
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
        self.layer_type = layer_type

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        return super().__call__(hidden, inputs.replace(rotary=inputs.rotary[self.layer_type]), cache)


@register_module(TaskType.BASE, config=Olmo3Config)
class Olmo3Model(Decoder):
    """The OLMo 3 backbone."""

    block_class = Olmo3Block
    rotary_by_kind = True


@register_module(TaskType.CAUSAL_LM, config=Olmo3Config)
class Olmo3ForCausalLM(CausalLM):
    """OLMo 3 with a language-model head."""

    backbone_class = Olmo3Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Olmo3Config)
class Olmo3ForSequenceClassification(SequenceClassifier):
    """OLMo 3 with a classification head on the last token."""

    backbone_class = Olmo3Model
