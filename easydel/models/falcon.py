"""Falcon (arXiv:2311.16867): its three forms, of 7B, of 40B and, with ALiBi and one after the other, of RW."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.transforms import TRANSPOSE, GroupedSplit
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    MLP,
    Attention,
    AttentionMask,
    KeyBias,
    LayerInputs,
    LayerOutput,
    RotaryByKind,
    RotaryEmbedding,
    alibi_slopes,
    attention_fields,
    counted,
    head_size,
    layer_norm,
    make_dropout,
)
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, QuestionAnswering, SequenceClassifier, TokenClassifier
from easydel.sharding import PartitionRules


@register_config("falcon")
class FalconConfig(EasyDeLBaseConfig, transformers.FalconConfig):
    """Fields of `transformers.FalconConfig`, and this library's runtime settings."""

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads, which three fields give between them."""
        if self.new_decoder_architecture:
            return self.num_kv_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def norms_of_parallel(self) -> int:
        """The number of norms before attention and MLP where they stand side by side."""
        given = self.num_ln_in_parallel_attn
        return (2 if self.new_decoder_architecture else 1) if given is None else given

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class FalconBlock(nnx.Module):
    """One layer: attention and MLP side by side behind one norm or a norm each, or one after the other."""

    def __init__(self, config: FalconConfig, layer_type: str, **options: Any) -> None:
        del layer_type  # all layers are alike
        _refuse_unsupported(config)
        bias, norms = bool(config.bias), 2 if not config.parallel_attn else config.norms_of_parallel
        fields = attention_fields(config) | {"num_kv_heads": config.kv_heads}
        if not config.alibi:  # as in transformers, rotated heads have no dropout on their weights
            fields["dropout"] = 0.0
        norm = {"features": config.hidden_size, "epsilon": config.layer_norm_epsilon, **options}
        self.input_layernorm = layer_norm(**norm)
        self.post_attention_layernorm: Any = layer_norm(**norm) if norms == 2 else None
        self.self_attn = Attention(**fields, qkv_bias=bias, out_bias=bias, **options)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_hidden_size,
            act=config.activation,
            use_bias=bias,
            init_stddev=config.initializer_range,
            **options,
        )
        self.parallel = bool(config.parallel_attn)
        self.attention_dropout = make_dropout(config.attention_dropout or 0.0, options["rngs"])
        self.dropout = make_dropout(config.hidden_dropout or 0.0, options["rngs"])

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        normed = self.input_layernorm(hidden)
        out = self.self_attn(normed, inputs, cache)
        if self.parallel:
            if self.post_attention_layernorm is not None:
                normed = self.post_attention_layernorm(hidden)
            return out.replace(hidden=hidden + self.dropout(self.mlp(normed) + out.hidden))
        hidden = hidden + self.attention_dropout(out.hidden)
        return out.replace(hidden=hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden))))


def _refuse_unsupported(config: FalconConfig) -> None:
    """Refuse what transformers' model cannot compute either."""
    head_size(config.hidden_size, config.num_attention_heads)
    new, norms = bool(config.new_decoder_architecture), config.norms_of_parallel
    if new and not config.parallel_attn:
        raise UnsupportedError("new_decoder_architecture=True with parallel_attn=False is not supported")
    if config.parallel_attn and norms not in ((1, 2) if new else (1,)):
        raise UnsupportedError(
            f"num_ln_in_parallel_attn={norms} with new_decoder_architecture={new} is not supported: one norm, or two "
            "with new_decoder_architecture=True"
        )
    if not new and not config.multi_query and config.num_kv_heads != config.num_attention_heads:
        raise ValueError(
            f"num_kv_heads={config.num_kv_heads} must be num_attention_heads={config.num_attention_heads} where "
            "neither new_decoder_architecture nor multi_query is set"
        )


@register_module(TaskType.BASE, config=FalconConfig)
class FalconModel(Decoder):
    """The Falcon backbone. With `alibi`, biases count the tokens themselves: `position_ids` change nothing."""

    block_class = FalconBlock
    base_model_prefix = "transformer"
    has_padding_token = False

    @property
    def weight_map(self) -> tuple[WeightRule, ...]:
        """The names in files, where a key/value head stands behind its queries."""
        fused, groups = "self_attention.query_key_value", self.config.kv_heads
        kernels, biases = (tuple(f"self_attn/{n}_proj/{leaf}" for n in "qkv") for leaf in ("kernel", "bias"))
        two = self.config.parallel_attn and self.config.norms_of_parallel == 2
        names = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
        return (
            WeightRule(f"{fused}.weight", kernels, GroupedSplit(groups, TRANSPOSE)),
            WeightRule(f"{fused}.bias", biases, GroupedSplit(groups)),
            WeightRule("self_attention.dense", "self_attn/o_proj", None),
            WeightRule("mlp.dense_h_to_4h", "mlp/up_proj", None),
            WeightRule("mlp.dense_4h_to_h", "mlp/down_proj", None),
            WeightRule(names[0], "input_layernorm", None),
            WeightRule(names[1], "post_attention_layernorm", None),
            WeightRule("word_embeddings", "embed_tokens", None),
            WeightRule("ln_f", "norm", None),
            WeightRule("h", "layers", None),
        )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_epsilon, **self.dtypes)

    def make_rotary(self) -> RotaryEmbedding | RotaryByKind | None:
        """Make the rotary positions, unless there is ALiBi."""
        return None if self.config.alibi else super().make_rotary()

    def position_bias(self, mask: AttentionMask, length: int) -> KeyBias | None:
        """Return ALiBi's biases (arXiv:2108.12409) as Falcon was trained with them, rounded to bfloat16.

        They are added before the products are scaled.
        """
        if not self.config.alibi:
            return None

        def rounded(x: jax.Array | np.ndarray) -> jax.Array:
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

        slopes = rounded(alibi_slopes(self.config.num_attention_heads))
        biases = rounded(slopes[:, None] * rounded(counted(mask, length))[:, None])
        return KeyBias(biases / self.config.head_dim**0.5)


@register_module(TaskType.CAUSAL_LM, config=FalconConfig)
class FalconForCausalLM(CausalLM):
    """Falcon with a language-model head."""

    backbone_class = FalconModel
    base_model_prefix = "transformer"
    tied_weight = "word_embeddings.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=FalconConfig)
class FalconForSequenceClassification(SequenceClassifier):
    """Falcon with a classification head on the last token."""

    backbone_class = FalconModel
    base_model_prefix = "transformer"


@register_module(TaskType.TOKEN_CLASSIFICATION, config=FalconConfig)
class FalconForTokenClassification(TokenClassifier):
    """Falcon with a classification head on every token."""

    backbone_class = FalconModel
    base_model_prefix = "transformer"


@register_module(TaskType.QUESTION_ANSWERING, config=FalconConfig)
class FalconForQuestionAnswering(QuestionAnswering):
    """Falcon with a head that marks the answer to a question."""

    backbone_class = FalconModel
    base_model_prefix = "transformer"
