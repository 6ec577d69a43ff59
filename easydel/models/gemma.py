"""Gemma (arXiv:2403.08295): Llama's block with scaled embeddings and norms that store their distance from one."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, RMSNorm, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gemma")
class GemmaConfig(EasyDeLBaseConfig, transformers.GemmaConfig):
    """Fields of `transformers.GemmaConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GemmaBlock(PreNormBlock):
    """One layer; norms store their scale as distance from one."""

    def __init__(self, config: GemmaConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        if config.use_bidirectional_attention:
            raise UnsupportedError("use_bidirectional_attention=True is not supported by Gemma models here")
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            norm=partial(RMSNorm, offset=1.0),
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=GemmaConfig)
class GemmaModel(Decoder):
    """The Gemma backbone."""

    block_class = GemmaBlock

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, offset=1.0, **self.dtypes)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids to embeddings times `sqrt(hidden_size)`, the factor rounded to their dtype."""
        return self.embed_tokens(input_ids) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)


@register_module(TaskType.CAUSAL_LM, config=GemmaConfig)
class GemmaForCausalLM(CausalLM):
    """Gemma with a language-model head."""

    backbone_class = GemmaModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GemmaConfig)
class GemmaForSequenceClassification(SequenceClassifier):
    """Gemma with a classification head on the last token."""

    backbone_class = GemmaModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=GemmaConfig)
class GemmaForTokenClassification(DecoderTokenClassifier):
    """Gemma with a classification head on every token."""

    backbone_class = GemmaModel
