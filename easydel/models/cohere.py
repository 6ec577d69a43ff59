"""Cohere's Command R: attention and MLP side by side behind one LayerNorm without bias, neighbours rotated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedMLP,
    HeadLayerNorm,
    PreNormBlock,
    attention_fields,
    layer_norm,
    mlp_fields,
)
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("cohere")
class CohereConfig(EasyDeLBaseConfig, transformers.CohereConfig):
    """Fields of `transformers.CohereConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class CohereBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: CohereConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, bias, epsilon = attention_fields(config), config.attention_bias, config.layer_norm_eps

        def head_norm(heads: int) -> HeadLayerNorm:
            return HeadLayerNorm(heads, fields["head_dim"], epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)

        norms = (lambda: head_norm(fields["num_heads"]), lambda: head_norm(fields["num_kv_heads"]))
        super().__init__(
            Attention(
                **fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=norms if config.use_qk_norm else None,
                interleaved=True,
                **options,
            ),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=epsilon,
            norm=partial(layer_norm, use_bias=False),
            parallel=True,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=CohereConfig)
class CohereModel(Decoder):
    """The Cohere backbone."""

    block_class = CohereBlock

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_eps, use_bias=False, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=CohereConfig)
class CohereForCausalLM(CausalLM):
    """Cohere with a language-model head whose logits are scaled."""

    backbone_class = CohereModel

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Multiply by `logit_scale`: what goes into the head rather than the logits, which are more numbers."""
        return hidden * self.config.logit_scale
