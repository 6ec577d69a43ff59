"""Gemma 3's text model (arXiv:2503.19786): Gemma 2 without caps, with normed heads and rotations by kind of layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, LayerInputs, LayerOutput, RMSNorm, SandwichBlock, attention_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gemma3_text")
class Gemma3TextConfig(EasyDeLBaseConfig, transformers.Gemma3TextConfig):
    """Fields of `transformers.Gemma3TextConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Gemma3Block(SandwichBlock):
    """One layer, full or sliding: norms on both sides of attention and MLP; rotated as its kind says."""

    def __init__(
        self, config: Gemma3TextConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        if config.use_bidirectional_attention:
            raise UnsupportedError("use_bidirectional_attention=True is not supported by Gemma 3 models here")
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        norms = partial(RMSNorm, offset=1.0)
        of_norms = {"epsilon": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(
                **attention_fields(config),
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                scale=config.query_pre_attn_scalar**-0.5,
                window=window_of(config, layer_type),
                qk_norm=lambda: norms(config.head_dim, **of_norms),
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
            norm=norms,
            **of_norms,
        )
        self.layer_type = layer_type

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        return super().__call__(hidden, inputs.replace(rotary=inputs.rotary[self.layer_type]), cache)


@register_module(TaskType.BASE, config=Gemma3TextConfig)
class Gemma3TextModel(Decoder):
    """The Gemma 3 backbone."""

    block_class = Gemma3Block
    rotary_by_kind = True

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, offset=1.0, **self.dtypes)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids to embeddings times `sqrt(hidden_size)`, the factor rounded to their dtype."""
        return self.embed_tokens(input_ids) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)


@register_module(TaskType.CAUSAL_LM, config=Gemma3TextConfig)
class Gemma3ForCausalLM(CausalLM):
    """Gemma 3 with a language-model head, its logits soft-capped if the config says so."""

    backbone_class = Gemma3TextModel

    @property
    def logit_softcap(self) -> float | None:
        """Logits `x` become `cap · tanh(x / cap)`; `None`: they stay."""
        return self.config.final_logit_softcapping


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Gemma3TextConfig)
class Gemma3TextForSequenceClassification(SequenceClassifier):
    """Gemma 3 with a classification head on the last token."""

    backbone_class = Gemma3TextModel
