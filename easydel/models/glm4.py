"""GLM-4-0414: GLM with norms after attention and MLP, too."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.hub.weight_map import TRANSPOSE, Split, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, SandwichBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("glm4")
class Glm4Config(EasyDeLBaseConfig, transformers.Glm4Config):
    """Fields of `transformers.Glm4Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Glm4Block(SandwichBlock):
    """One layer."""

    def __init__(self, config: Glm4Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
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


@register_module(TaskType.BASE, config=Glm4Config)
class Glm4Model(Decoder):
    """The GLM-4-0414 backbone."""

    block_class = Glm4Block
    partial_rotary = True
    weight_map = (
        WeightRule("mlp.gate_up_proj.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), Split(0, TRANSPOSE)),
        # Renames apply in order: the files call the norm before the MLP as others call the one after attention.
        WeightRule("post_self_attn_layernorm", "post_attention_layernorm", None),
        WeightRule("post_attention_layernorm", "pre_feedforward_layernorm", None),
        WeightRule("post_mlp_layernorm", "post_feedforward_layernorm", None),
    )


@register_module(TaskType.CAUSAL_LM, config=Glm4Config)
class Glm4ForCausalLM(CausalLM):
    """GLM-4-0414 with a language-model head."""

    backbone_class = Glm4Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Glm4Config)
class Glm4ForSequenceClassification(SequenceClassifier):
    """GLM-4-0414 with a classification head on the last token."""

    backbone_class = Glm4Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Glm4Config)
class Glm4ForTokenClassification(DecoderTokenClassifier):
    """GLM-4-0414 with a classification head on every token."""

    backbone_class = Glm4Model
