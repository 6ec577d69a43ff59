"""Gemma 3's text model (arXiv:2503.19786): Gemma 2 without caps, with normed heads and rotations by kind of layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedMLP,
    LayerInputs,
    LayerOutput,
    RMSNorm,
    RotaryByKind,
    RotaryEmbedding,
    attention_fields,
)
from easydel.models.decoder import Decoder, decoder_rules, layer_types, window_of
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gemma3_text")
class Gemma3TextConfig(EasyDeLBaseConfig, transformers.Gemma3TextConfig):
    """Fields of `transformers.Gemma3TextConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Gemma3Block(nnx.Module):
    """One layer, full or sliding: norms on both sides of attention and MLP; rotated as its kind says."""

    def __init__(
        self, config: Gemma3TextConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        if config.use_bidirectional_attention:
            raise UnsupportedError("use_bidirectional_attention=True is not supported by Gemma 3 models here")
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        make = partial(RMSNorm, epsilon=config.rms_norm_eps, offset=1.0, dtype=dtype, param_dtype=param_dtype)
        self.layer_type = layer_type
        self.input_layernorm = make(config.hidden_size)
        self.self_attn = Attention(
            **attention_fields(config),
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            window=window_of(config, layer_type),
            qk_norm=lambda: make(config.head_dim),
            **options,
        )
        self.post_attention_layernorm = make(config.hidden_size)
        self.pre_feedforward_layernorm = make(config.hidden_size)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_activation,
            init_stddev=config.initializer_range,
            **options,
        )
        self.post_feedforward_layernorm = make(config.hidden_size)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        inputs = inputs.replace(rotary=inputs.rotary[self.layer_type])
        out = self.self_attn(self.input_layernorm(hidden), inputs, cache)
        hidden = hidden + self.post_attention_layernorm(out.hidden)
        transformed = self.mlp(self.pre_feedforward_layernorm(hidden))
        return out.replace(hidden=hidden + self.post_feedforward_layernorm(transformed))


@register_module(TaskType.BASE, config=Gemma3TextConfig)
class Gemma3TextModel(Decoder):
    """The Gemma 3 backbone."""

    block_class = Gemma3Block

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, offset=1.0, **self.dtypes)

    def make_rotary(self) -> Any:
        """Make the rotary positions of each kind of layer."""
        config = self.config
        make = partial(
            RotaryEmbedding,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            partial=False,
        )
        return RotaryByKind(
            tuple((kind, make(config.rope_parameters[kind])) for kind in sorted(set(layer_types(config))))
        )

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
