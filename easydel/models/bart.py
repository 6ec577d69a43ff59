"""BART (arXiv:1910.13461): an encoder and a decoder with learned positions and a norm after each residual."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.caching import EncoderDecoderCache
from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    MLP,
    Attention,
    CrossAttention,
    Embed,
    LayerInputs,
    LayerOutput,
    layer_norm,
    make_dropout,
    make_layers,
)
from easydel.layers.linear import normal_init
from easydel.layers.stack import StackOutput
from easydel.models.encoder_decoder import EncoderDecoder
from easydel.models.inputs import shift_right
from easydel.models.tasks import FirstTokenClassifier, QuestionAnswering, Seq2SeqLM
from easydel.outputs import Seq2SeqQuestionAnsweringOutput, Seq2SeqSequenceClassifierOutput
from easydel.sharding import PartitionRules

EPSILON = 1e-5
"""Of all norms."""
OFFSET = 2
"""The row of the first position in the tables: the first two were those of padding."""


@register_config("bart")
class BartConfig(EasyDeLBaseConfig, transformers.BartConfig):
    """Fields of `transformers.BartConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return (
            (r"embed_tokens/embedding", PartitionSpec("tp", "fsdp")),
            (r"embed_positions/embedding", PartitionSpec(None, "fsdp")),
            (r"(self|cross)_attn/(q|k|v)_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"(self|cross)_attn/o_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"mlp/up_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"mlp/down_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"dense/kernel", PartitionSpec("tp", "fsdp")),
            (r"(classifier|qa_outputs)/kernel", PartitionSpec("fsdp", None)),
            (r"final_logits_bias", PartitionSpec(None, "tp")),
            (r"(q|k|v|up)_proj/bias", PartitionSpec("tp")),
            (r"norm/scale|bias", PartitionSpec()),
        )


class BartBlock(nnx.Module):
    """One layer: self-attention, in the decoder attention to the encoder, and MLP, each with a norm after it."""

    def __init__(
        self, config: BartConfig, is_decoder: bool, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs
    ) -> None:
        side = "decoder" if is_decoder else "encoder"
        heads = getattr(config, f"{side}_attention_heads")
        if config.d_model % heads:
            raise ValueError(f"{side}_attention_heads={heads} must divide d_model={config.d_model}")
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options: dict[str, Any] = {**dtypes, "precision": precision, "rngs": rngs, "init_stddev": config.init_std}
        attention: dict[str, Any] = {
            "hidden_size": config.d_model,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": config.d_model // heads,
            "qkv_bias": True,
            "out_bias": True,
            "mechanism": config.attn_mechanism,
            "block_size": config.attn_block_size,
            "dropout": config.attention_dropout,
        }
        self.self_attn = Attention(**attention, causal=is_decoder, **options)
        self.attention_norm = layer_norm(config.d_model, EPSILON, **dtypes)
        if is_decoder:
            self.cross_attn = CrossAttention(**attention, **options)
            self.cross_attention_norm = layer_norm(config.d_model, EPSILON, **dtypes)
        self.mlp = MLP(
            config.d_model,
            getattr(config, f"{side}_ffn_dim"),
            act=config.activation_function,
            dropout=config.activation_dropout,
            **options,
        )
        self.output_norm = layer_norm(config.d_model, EPSILON, **dtypes)
        self.dropout = make_dropout(config.dropout, rngs)
        self.is_decoder = is_decoder

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> EncoderDecoderCache | None:
        """Make this layer's empty cache; the encoder needs none."""
        if not self.is_decoder:
            return None
        attentions = (self.self_attn, self.cross_attn)
        return EncoderDecoderCache(*(layer.init_cache(batch_size, max_length, dtype) for layer in attentions))

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: EncoderDecoderCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        out = self.self_attn(hidden, inputs, None if cache is None else cache.own)
        hidden = self.attention_norm(hidden + self.dropout(out.hidden))
        if self.is_decoder:
            cross = self.cross_attn(hidden, inputs, None if cache is None else cache.cross)
            hidden = self.cross_attention_norm(hidden + self.dropout(cross.hidden))
            kept = None if cache is None else EncoderDecoderCache(out.cache, cross.cache)
            out = out.replace(cache=kept, cross_attention=cross.attention)
        hidden = self.output_norm(hidden + self.dropout(self.mlp(hidden)))
        return out.replace(hidden=hidden if self.is_decoder else within_range(hidden))


def within_range(hidden: jax.Array) -> jax.Array:
    """Clip what overflows float16, as transformers' encoder does."""
    if hidden.dtype != jnp.float16:
        return hidden
    largest = jnp.finfo(jnp.float16).max - 1000
    return jnp.clip(hidden, -largest, largest)


class BartSide(nnx.Module):
    """The encoder or the decoder: a table of positions, a norm, and blocks."""

    def __init__(self, config: BartConfig, is_decoder: bool, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.embed_positions = Embed(
            config.max_position_embeddings + OFFSET,
            config.d_model,
            embedding_init=normal_init(config.init_std),
            rows=None,
            rngs=rngs,
            **options,
        )
        self.embed_norm = layer_norm(config.d_model, EPSILON, **options)
        depth = config.decoder_layers if is_decoder else config.encoder_layers
        self.layers = make_layers(
            lambda kind: BartBlock(config, kind, rngs=rngs, **options),
            [is_decoder] * depth,
            rngs,
            scan=config.scan_layers,
        )
        self.dropout = make_dropout(config.dropout, rngs)
        self.remat = config.gradient_checkpointing

    def __call__(self, hidden: jax.Array, positions: jax.Array, inputs: LayerInputs, caches: Any) -> StackOutput:
        """Run all layers; see `EncoderDecoder`."""
        placed = hidden + self.embed_positions(positions + OFFSET)
        return self.layers.run(self.dropout(self.embed_norm(placed)), inputs, caches, self.remat)


@register_module(TaskType.BASE, config=BartConfig)
class BartModel(EncoderDecoder):
    """The BART backbone."""

    side_class = BartSide
    weight_map = (
        WeightRule("shared", "embed_tokens", None),
        WeightRule("layernorm_embedding", "embed_norm", None),
        WeightRule("self_attn.out_proj", "self_attn/o_proj", None),
        WeightRule("encoder_attn.out_proj", "cross_attn/o_proj", None),
        WeightRule("encoder_attn", "cross_attn", None),
        WeightRule("self_attn_layer_norm", "attention_norm", None),
        WeightRule("encoder_attn_layer_norm", "cross_attention_norm", None),
        WeightRule("fc1", "mlp/up_proj", None),
        WeightRule("fc2", "mlp/down_proj", None),
        WeightRule("final_layer_norm", "output_norm", None),
    )
    # Of fairseq; and a buffer of zeros that only the language model reads.
    harmless_extras = (r"(en|de)coder\.version$", r"^final_logits_bias$")

    def __init__(
        self,
        config: BartConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        _refuse_unsupported(config)
        super().__init__(config, dtype, param_dtype, precision, rngs)

    def make_embedding(self, **options: Any) -> Embed:
        """Make the table of both sides' tokens."""
        config = self.config
        drawn = normal_init(config.init_std)
        return Embed(
            config.vocab_size, config.d_model, embedding_init=drawn, padding_idx=config.pad_token_id, **options
        )

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids to embeddings, times `sqrt(d_model)` if `scale_embedding`."""
        embedded = self.embed_tokens(input_ids)
        return embedded * jnp.asarray(self.config.d_model**0.5, self.dtype) if self.config.scale_embedding else embedded

    @property
    def longest_sequence(self) -> int:
        """The longest sequence each side can take: one position for each token."""
        return self.config.max_position_embeddings

    def decoder_ids(self, input_ids: jax.Array | None) -> jax.Array | None:
        """Return the encoder's tokens shifted right: what BART writes, unless told otherwise, is what it read."""
        return None if input_ids is None else shift_right(self.config, input_ids)

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table → the shared one."""
        return {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}


class LogitsBias(nnx.Variable):
    """What is added to the logits, `[1, vocab]`: stored, but not trained."""


@register_module(TaskType.SEQ2SEQ, config=BartConfig)
class BartForConditionalGeneration(Seq2SeqLM):
    """BART with a language-model head; its logits have a bias, zero in all published files."""

    backbone_class = BartModel

    def _add_head(self, rngs: nnx.Rngs) -> None:
        super()._add_head(rngs)
        self.final_logits_bias = LogitsBias(jnp.zeros((1, self.config.vocab_size), self.param_dtype))

    def head_bias(self) -> jax.Array:
        """Return what is added to the logits, `[vocab]`."""
        return self.final_logits_bias.get_value()[0]

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table and the head → the shared one."""
        return _tied_under_a_head(self) | {"lm_head.weight": "model.shared.weight"}


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=BartConfig)
class BartForSequenceClassification(FirstTokenClassifier):
    """BART with a classification head on the decoder's state at each row's last `eos_token_id`.

    Give it `input_ids`: the decoder reads the same tokens. A row without that token has no such state; its logits are
    NaN.
    """

    backbone_class = BartModel
    output_class = Seq2SeqSequenceClassifierOutput
    weight_map = (
        WeightRule("classification_head.dense", "dense", None),
        WeightRule("classification_head.out_proj", "classifier", None),
    )

    @property
    def head_stddev(self) -> float:
        """The deviation of the head's new weights."""
        return self.config.init_std

    def pick(self, hidden: jax.Array, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> jax.Array:
        """Return the state at the last end of text of each row, `[batch, hidden]`."""
        del attention_mask
        end = self.config.eos_token_id
        if input_ids is None or not isinstance(end, int):
            given = "no input_ids" if input_ids is None else f"eos_token_id={end!r}"
            raise ValueError(f"BART classifies by the place of eos_token_id (one number) in input_ids: got {given}")
        ends = jnp.asarray(input_ids) == end
        last = jnp.max(jnp.where(ends, jnp.arange(ends.shape[1]), 0), axis=1)
        picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return jnp.where(ends.any(axis=1)[:, None], picked, jnp.nan)

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table → the shared one."""
        return _tied_under_a_head(self)


@register_module(TaskType.QUESTION_ANSWERING, config=BartConfig)
class BartForQuestionAnswering(QuestionAnswering):
    """BART that marks where an answer begins and ends; the decoder reads the same tokens as the encoder."""

    backbone_class = BartModel
    output_class = Seq2SeqQuestionAnsweringOutput
    reads_num_labels = False  # the default is that of its classifiers, 3, and configs of transformers leave it so

    @property
    def head_stddev(self) -> float:
        """The deviation of the head's new weights."""
        return self.config.init_std

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table → the shared one."""
        return _tied_under_a_head(self)


def _tied_under_a_head(model: Any) -> dict[str, str]:
    return {f"model.{alias}": f"model.{name}" for alias, name in model.base_model.tied_names().items()}


def _refuse_unsupported(config: BartConfig) -> None:
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name):
            raise UnsupportedError(
                f"{name}={getattr(config, name)} is not supported: set it to 0, no layer is left out"
            )
    if not config.tie_word_embeddings:
        raise UnsupportedError(
            "tie_word_embeddings=False is not supported by BART models here: both sides and the head share one table"
        )
