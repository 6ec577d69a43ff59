"""OLMo (arXiv:2402.00838): Llama's block with norms that have no parameters; queries, keys, values clipped."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, layer_norm, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("olmo")
class OlmoConfig(EasyDeLBaseConfig, transformers.OlmoConfig):
    """Fields of `transformers.OlmoConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


EPSILON = 1e-5
"""Added to the variance in every norm: a constant of the family."""

plain_norm = partial(layer_norm, use_scale=False, use_bias=False)


class OlmoBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: OlmoConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, clip=config.clip_qkv, **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=EPSILON,
            norm=plain_norm,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=OlmoConfig)
class OlmoModel(Decoder):
    """The OLMo backbone."""

    block_class = OlmoBlock

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return plain_norm(self.config.hidden_size, EPSILON, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=OlmoConfig)
class OlmoForCausalLM(CausalLM):
    """OLMo with a language-model head."""

    backbone_class = OlmoModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=OlmoConfig)
class OlmoForSequenceClassification(SequenceClassifier):
    """OLMo with a classification head on the last token."""

    backbone_class = OlmoModel
