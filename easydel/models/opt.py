"""OPT (arXiv:2205.01068): learned positions, biases everywhere, norms before attention and MLP or after."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    MLP,
    Attention,
    Embed,
    LayerInputs,
    LayerOutput,
    Linear,
    attention_fields,
    head_size,
    layer_norm,
    make_dropout,
)
from easydel.layers.linear import normal_init
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules

UNUSED_POSITIONS = 2
"""Rows of the table of positions before that of the first token."""


@register_config("opt")
class OPTConfig(EasyDeLBaseConfig, transformers.OPTConfig):
    """Fields of `transformers.OPTConfig`, and this library's runtime settings."""

    @property
    def initializer_range(self) -> float:
        """What other families call `init_std`."""
        return self.init_std

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return ((r"project_(in|out)/kernel", PartitionSpec("fsdp", None)), *decoder_rules())


def _norm(config: OPTConfig, **options: Any) -> nnx.LayerNorm:
    learned = config.layer_norm_elementwise_affine
    return layer_norm(config.hidden_size, 1e-5, use_scale=learned, use_bias=learned, **options)


class OPTBlock(nnx.Module):
    """One layer, whose norms come before attention and MLP, or after what these add."""

    def __init__(self, config: OPTConfig, layer_type: str, **options: Any) -> None:
        del layer_type  # all layers are alike
        if config.layerdrop:
            raise UnsupportedError(f"layerdrop={config.layerdrop} is not supported by OPT models here, only 0")
        head_size(config.hidden_size, config.num_attention_heads)
        bias = config.enable_bias
        self.norms_first = config.do_layer_norm_before
        self.input_layernorm = _norm(config, **options)
        self.self_attn = Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options)
        self.post_attention_layernorm = _norm(config, **options)
        self.mlp = MLP(
            config.hidden_size,
            config.ffn_dim,
            act=config.activation_function,
            use_bias=bias,
            init_stddev=config.init_std,
            **options,
        )
        self.dropout = make_dropout(config.dropout, options["rngs"])

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        if self.norms_first:
            out = self.self_attn(self.input_layernorm(hidden), inputs, cache)
            hidden = hidden + self.dropout(out.hidden)
            return out.replace(hidden=hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden))))
        out = self.self_attn(hidden, inputs, cache)
        hidden = self.input_layernorm(hidden + self.dropout(out.hidden))
        return out.replace(hidden=self.post_attention_layernorm(hidden + self.dropout(self.mlp(hidden))))


@register_module(TaskType.BASE, config=OPTConfig)
class OPTModel(Decoder):
    """The OPT backbone; with `word_embed_proj_dim`, tokens are of another size than the layers."""

    block_class = OPTBlock
    weight_map = (
        WeightRule("self_attn.out_proj", "self_attn/o_proj", None),
        WeightRule("self_attn_layer_norm", "input_layernorm", None),
        WeightRule("final_layer_norm", "post_attention_layernorm", None),
        WeightRule("fc1", "mlp/up_proj", None),
        WeightRule("fc2", "mlp/down_proj", None),
        WeightRule("decoder.final_layer_norm", "norm", None),
        *(WeightRule(f"decoder.{name}", name, None) for name in ("embed_tokens", "embed_positions", "layers")),
        *(WeightRule(f"decoder.{name}", name, None) for name in ("project_in", "project_out")),
    )

    @property
    def token_size(self) -> int:
        """Size of the vectors that stand for tokens."""
        return self.config.word_embed_proj_dim

    @property
    def longest_sequence(self) -> int:
        """The number of learned positions."""
        return self.config.max_position_embeddings

    def make_norm(self) -> nnx.LayerNorm | None:
        """Make the norm after the last layer, if there is one."""
        config = self.config
        has_one = config.do_layer_norm_before and not config._remove_final_layer_norm
        return _norm(config, **self.dtypes) if has_one else None

    def make_rotary(self) -> None:
        """Positions are learned."""

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the learned positions, and the projections from and to the size of tokens."""
        config, initial = self.config, normal_init(self.config.init_std)
        rows = config.max_position_embeddings + UNUSED_POSITIONS
        self.embed_positions = Embed(
            rows, config.hidden_size, embedding_init=initial, rows=None, rngs=rngs, **self.dtypes
        )

        def linear(features_in: int, features_out: int) -> Linear | None:
            if self.token_size == config.hidden_size:
                return None
            options: dict[str, Any] = {"kernel_init": initial, "precision": self.precision, "rngs": rngs}
            return Linear(features_in, features_out, roles=(None, None), use_bias=False, **options, **self.dtypes)

        self.project_in = linear(self.token_size, config.hidden_size)
        self.project_out = linear(config.hidden_size, self.token_size)

    def default_positions(self, positions: jax.Array, tokens: jax.Array | None) -> jax.Array:
        """Give padding the position before that of a first token."""
        return positions if tokens is None else jnp.where(tokens, positions, -1)

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Add the learned positions to tokens of the layers' size."""
        hidden = hidden if self.project_in is None else self.project_in(hidden)
        return hidden + self.embed_positions(positions + UNUSED_POSITIONS)

    def finish(self, hidden: jax.Array) -> jax.Array:
        """Normalise, where norms come first, and map to the size of tokens."""
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden)


@register_module(TaskType.CAUSAL_LM, config=OPTConfig)
class OPTForCausalLM(CausalLM):
    """OPT with a language-model head."""

    backbone_class = OPTModel
    tied_weight = "decoder.embed_tokens.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=OPTConfig)
class OPTForSequenceClassification(SequenceClassifier):
    """OPT with a classification head on the last token."""

    backbone_class = OPTModel


@register_module(TaskType.QUESTION_ANSWERING, config=OPTConfig)
class OPTForQuestionAnswering(QuestionAnswering):
    """OPT with a head that marks the answer to a question."""

    backbone_class = OPTModel
