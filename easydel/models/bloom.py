"""BLOOM (arXiv:2211.05100): ALiBi in place of positions, a norm after the embeddings, residuals normed if asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
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


@register_config("bloom")
class BloomConfig(EasyDeLBaseConfig, transformers.BloomConfig):
    """Fields of `transformers.BloomConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class BloomBlock(nnx.Module):
    """One layer; attention and MLP are added to what came in, or to its norm."""

    def __init__(self, config: BloomConfig, layer_type: str, **options: Any) -> None:
        del layer_type  # all layers are alike
        if config.slow_but_exact and config.pretraining_tp > 1:  # leaves the biases of two layers out
            raise UnsupportedError(
                f"slow_but_exact=True with pretraining_tp={config.pretraining_tp} is not supported by BLOOM models "
                "here; set slow_but_exact=False"
            )
        width, epsilon, stddev = config.hidden_size, config.layer_norm_epsilon, config.initializer_range
        head_size(width, config.num_attention_heads)
        self.adds_to_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = layer_norm(width, epsilon, **options)
        self.self_attn = Attention(**attention_fields(config), qkv_bias=True, out_bias=True, **options)
        self.post_attention_layernorm = layer_norm(width, epsilon, **options)
        self.mlp = MLP(width, 4 * width, act="gelu_pytorch_tanh", init_stddev=stddev, **options)
        self.dropout = make_dropout(config.hidden_dropout, options["rngs"])

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        normed = self.input_layernorm(hidden)
        out = self.self_attn(normed, inputs, cache)
        hidden = (normed if self.adds_to_norm else hidden) + self.dropout(out.hidden)
        normed = self.post_attention_layernorm(hidden)
        return out.replace(hidden=(normed if self.adds_to_norm else hidden) + self.dropout(self.mlp(normed)))


@register_module(TaskType.BASE, config=BloomConfig)
class BloomModel(Decoder):
    """The BLOOM backbone. Its biases count the tokens themselves: `position_ids` change nothing, as in transformers."""

    block_class = BloomBlock
    base_model_prefix = "transformer"
    has_padding_token = False

    @property
    def weight_map(self) -> tuple[WeightRule, ...]:
        """The names in files, where queries, keys and values are one, head by head."""
        fused, heads = "self_attention.query_key_value", self.config.num_attention_heads
        kernels, biases = (tuple(f"self_attn/{n}_proj/{leaf}" for n in "qkv") for leaf in ("kernel", "bias"))
        return (
            WeightRule(f"{fused}.weight", kernels, GroupedSplit(heads, TRANSPOSE)),
            WeightRule(f"{fused}.bias", biases, GroupedSplit(heads)),
            WeightRule("self_attention.dense", "self_attn/o_proj", None),
            WeightRule("mlp.dense_h_to_4h", "mlp/up_proj", None),
            WeightRule("mlp.dense_4h_to_h", "mlp/down_proj", None),
            WeightRule("word_embeddings", "embed_tokens", None),
            WeightRule("word_embeddings_layernorm", "embed_norm", None),
            WeightRule("ln_f", "norm", None),
            WeightRule("h", "layers", None),
        )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_epsilon, **self.dtypes)

    def make_rotary(self) -> None:
        """Positions are biases of attention."""

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the norm after the embeddings."""
        del rngs
        self.embed_norm = self.make_norm()

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Normalise the embeddings."""
        del positions
        return self.embed_norm(hidden)

    def position_bias(self, mask: AttentionMask, length: int) -> KeyBias:
        """Return ALiBi's biases (arXiv:2108.12409)."""
        slopes = jnp.asarray(alibi_slopes(self.config.num_attention_heads))
        return KeyBias(slopes[:, None] * counted(mask, length)[:, None])


@register_module(TaskType.CAUSAL_LM, config=BloomConfig)
class BloomForCausalLM(CausalLM):
    """BLOOM with a language-model head."""

    backbone_class = BloomModel
    base_model_prefix = "transformer"
    tied_weight = "word_embeddings.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=BloomConfig)
class BloomForSequenceClassification(SequenceClassifier):
    """BLOOM with a classification head on the last token."""

    backbone_class = BloomModel
    base_model_prefix = "transformer"


@register_module(TaskType.TOKEN_CLASSIFICATION, config=BloomConfig)
class BloomForTokenClassification(TokenClassifier):
    """BLOOM with a classification head on every token."""

    backbone_class = BloomModel
    base_model_prefix = "transformer"


@register_module(TaskType.QUESTION_ANSWERING, config=BloomConfig)
class BloomForQuestionAnswering(QuestionAnswering):
    """BLOOM with a head that marks the answer to a question."""

    backbone_class = BloomModel
    base_model_prefix = "transformer"
