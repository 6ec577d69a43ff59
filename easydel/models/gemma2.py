"""Gemma 2 (arXiv:2408.00118): norms on both sides of each layer, soft-capped logits, every other layer sliding."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, RMSNorm, SandwichBlock, attention_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gemma2")
class Gemma2Config(EasyDeLBaseConfig, transformers.Gemma2Config):
    """Fields of `transformers.Gemma2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Gemma2Block(SandwichBlock):
    """One layer: a norm before and one after both attention and MLP; norms store their scale as distance from one."""

    def __init__(self, config: Gemma2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        if config.use_bidirectional_attention:
            raise UnsupportedError("use_bidirectional_attention=True is not supported by Gemma2 models here")
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(
                **attention_fields(config),
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                scale=config.query_pre_attn_scalar**-0.5,
                window=window_of(config, layer_type),
                softcap=config.attn_logit_softcapping,
                **options,
            ),
            GatedMLP(
                config.hidden_size,
                config.intermediate_size,
                act=config.hidden_activation,
                init_stddev=config.initializer_range,
                **options,
            ),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            norm=partial(RMSNorm, offset=1.0),
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Gemma2Config)
class Gemma2Model(Decoder):
    """The Gemma 2 backbone."""

    block_class = Gemma2Block

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, offset=1.0, **self.dtypes)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids to embeddings times `sqrt(hidden_size)`, the factor rounded to their dtype."""
        return self.embed_tokens(input_ids) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)


@register_module(TaskType.CAUSAL_LM, config=Gemma2Config)
class Gemma2ForCausalLM(CausalLM):
    """Gemma 2 with a language-model head whose logits are soft-capped."""

    backbone_class = Gemma2Model

    @property
    def logit_softcap(self) -> float | None:
        """Logits `x` become `cap · tanh(x / cap)`; `None`: they stay."""
        return self.config.final_logit_softcapping


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Gemma2Config)
class Gemma2ForSequenceClassification(SequenceClassifier):
    """Gemma 2 with a classification head on the last token."""

    backbone_class = Gemma2Model
