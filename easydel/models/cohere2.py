"""Cohere's Command R7B and Command A (arXiv:2504.00698): as Command R, with sliding layers; only these rotate."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, layer_norm, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("cohere2")
class Cohere2Config(EasyDeLBaseConfig, transformers.Cohere2Config):
    """Fields of `transformers.Cohere2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Cohere2Block(PreNormBlock):
    """One layer: sliding and rotated, or full without positions."""

    def __init__(self, config: Cohere2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, window = config.attention_bias, window_of(config, layer_type)
        super().__init__(
            Attention(
                **attention_fields(config),
                qkv_bias=bias,
                out_bias=bias,
                window=window,
                rotates=window is not None,
                interleaved=True,
                **options,
            ),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.layer_norm_eps,
            norm=partial(layer_norm, use_bias=False),
            parallel=True,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Cohere2Config)
class Cohere2Model(Decoder):
    """The Cohere 2 backbone."""

    block_class = Cohere2Block

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_eps, use_bias=False, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=Cohere2Config)
class Cohere2ForCausalLM(CausalLM):
    """Cohere 2 with a language-model head whose logits are scaled."""

    backbone_class = Cohere2Model

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Multiply by `logit_scale`: what goes into the head rather than the logits, which are more numbers."""
        return hidden * self.config.logit_scale
