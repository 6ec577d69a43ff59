"""Granite 3 (arXiv:2405.04324): Llama's block with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from typing import Any

import jax
import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("granite")
class GraniteConfig(EasyDeLBaseConfig, transformers.GraniteConfig):
    """Fields of `transformers.GraniteConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GraniteBlock(PreNormBlock):
    """One layer; `attention_multiplier` stands in place of `head_dim ** -0.5`."""

    def __init__(self, config: GraniteConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, scale = config.attention_bias, config.attention_multiplier
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, scale=scale, **options),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            residual_scale=config.residual_multiplier,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=GraniteConfig)
class GraniteModel(Decoder):
    """The Granite backbone."""

    block_class = GraniteBlock

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Multiply embeddings, given ones too, by `embedding_multiplier`."""
        del positions
        return hidden * self.config.embedding_multiplier


@register_module(TaskType.CAUSAL_LM, config=GraniteConfig)
class GraniteForCausalLM(CausalLM):
    """Granite with a language-model head."""

    backbone_class = GraniteModel

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Divide by `logits_scaling`: what goes into the head rather than the logits, which are more numbers."""
        return hidden / self.config.logits_scaling
