"""StableLM (arXiv:2402.17834): LayerNorm, a part of each head rotated, attention and MLP side by side if asked for."""

from __future__ import annotations

from typing import Any

import transformers
from flax import nnx

from easydel.hub.weight_map import Stack, WeightRule
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
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("stablelm")
class StableLmConfig(EasyDeLBaseConfig, transformers.StableLmConfig):
    """Fields of `transformers.StableLmConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class StableLmBlock(PreNormBlock):
    """One layer."""

    def __init__(
        self, config: StableLmConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, epsilon = attention_fields(config), config.layer_norm_eps
        fields["head_dim"] = size = config.hidden_size // config.num_attention_heads
        if size * config.num_attention_heads != config.hidden_size:
            heads = config.num_attention_heads
            raise ValueError(f"num_attention_heads={heads} must divide hidden_size={config.hidden_size}")

        def head_norm(heads: int) -> HeadLayerNorm:
            return HeadLayerNorm(heads, size, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype)

        norms = (lambda: head_norm(fields["num_heads"]), lambda: head_norm(fields["num_kv_heads"]))
        super().__init__(
            Attention(
                **fields, qkv_bias=config.use_qkv_bias, qk_norm=norms if config.qk_layernorm else None, **options
            ),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=epsilon,
            norm=layer_norm,
            parallel=config.use_parallel_residual,
            dropout=(0.0, config.hidden_dropout),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=StableLmConfig)
class StableLmModel(Decoder):
    """The StableLM backbone."""

    block_class = StableLmBlock
    partial_rotary = True
    weight_map = tuple(
        WeightRule(f"self_attn.{name}_layernorm.norms.{{head}}.weight", f"self_attn/{name}_norm/scale", Stack())
        for name in "qk"
    )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_eps, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=StableLmConfig)
class StableLmForCausalLM(CausalLM):
    """StableLM with a language-model head."""

    backbone_class = StableLmModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=StableLmConfig)
class StableLmForSequenceClassification(SequenceClassifier):
    """StableLM with a classification head on the last token."""

    backbone_class = StableLmModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=StableLmConfig)
class StableLmForTokenClassification(DecoderTokenClassifier):
    """StableLM with a classification head on every token."""

    backbone_class = StableLmModel
