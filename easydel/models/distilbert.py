"""DistilBERT (arXiv:1910.01108): BERT's blocks without pooler and token types, under names of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, LayerInputs, LayerOutput, layer_norm, make_dropout
from easydel.models.encoder import Encoder, encoder_rules
from easydel.models.tasks import Embedding, FirstTokenClassifier, MaskedLM, QuestionAnswering, TokenClassifier
from easydel.sharding import PartitionRules

EPSILON = 1e-12
"""Of all norms."""


@register_config("distilbert")
class DistilBertConfig(EasyDeLBaseConfig, transformers.DistilBertConfig):
    """Fields of `transformers.DistilBertConfig`, this library's runtime settings, and how `…ForEmbedding` pools.

    Attributes:
        embedding_pooling: `"mean"`, `"cls"` or `"last"`.
        embedding_normalize: whether embeddings are scaled to length one.
    """

    embedding_pooling: str = "mean"
    embedding_normalize: bool = True

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return encoder_rules()


class DistilBertBlock(nnx.Module):
    """One layer: attention and MLP, each with a norm *after* its residual; dropout on what the MLP adds alone."""

    def __init__(self, config: DistilBertConfig, kind: str, *, rngs: nnx.Rngs, **options: Any) -> None:
        del kind  # all layers are alike
        if config.dim % config.n_heads:
            raise ValueError(f"n_heads={config.n_heads} must divide dim={config.dim}")
        self.self_attn = Attention(
            config.dim,
            config.n_heads,
            config.n_heads,
            config.dim // config.n_heads,
            qkv_bias=True,
            out_bias=True,
            causal=False,
            mechanism=config.attn_mechanism,
            block_size=config.attn_block_size,
            dropout=config.attention_dropout,
            init_stddev=config.initializer_range,
            rngs=rngs,
            **options,
        )
        self.attention_norm = layer_norm(config.dim, EPSILON, **options)
        self.mlp = MLP(
            config.dim,
            config.hidden_dim,
            act=config.activation,
            init_stddev=config.initializer_range,
            rngs=rngs,
            **options,
        )
        self.output_norm = layer_norm(config.dim, EPSILON, **options)
        self.dropout = make_dropout(config.dropout, rngs)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the attention weights."""
        out = self.self_attn(hidden, inputs, cache)
        hidden = self.attention_norm(hidden + out.hidden)
        return out.replace(hidden=self.output_norm(hidden + self.dropout(self.mlp(hidden))))


@register_module(TaskType.BASE, config=DistilBertConfig)
class DistilBertModel(Encoder):
    """The DistilBERT backbone."""

    block_class = DistilBertBlock
    base_model_prefix = "distilbert"
    harmless_extras = (r"embeddings\.position_ids$",)
    legacy_names = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    weight_map = (
        WeightRule("embeddings.word_embeddings", "embed_tokens", None),
        WeightRule("embeddings.position_embeddings", "embed_positions", None),
        WeightRule("embeddings.LayerNorm", "embed_norm", None),
        *(WeightRule(f"attention.{letter}_lin", f"self_attn/{letter}_proj", None) for letter in "qkv"),
        WeightRule("attention.out_lin", "self_attn/o_proj", None),
        WeightRule("sa_layer_norm", "attention_norm", None),
        WeightRule("ffn.lin1", "mlp/up_proj", None),
        WeightRule("ffn.lin2", "mlp/down_proj", None),
        WeightRule("output_layer_norm", "output_norm", None),
        WeightRule("transformer.layer", "layers", None),
    )

    def __init__(
        self,
        config: DistilBertConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed_positions = self.table(config.max_position_embeddings, rngs)
        if config.sinusoidal_pos_embds:  # where they begin: they are stored and trained as any others
            waves = sinusoids(config.max_position_embeddings, config.dim)
            self.embed_positions.embedding.set_value(jnp.asarray(waves, self.param_dtype))
        self.embed_norm = layer_norm(config.dim, EPSILON, **self.dtypes)
        self.dropout = make_dropout(config.dropout, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Add the vectors of the tokens' positions, and normalise."""
        del token_type_ids
        return self.dropout(self.embed_norm(hidden + self.embed_positions(positions)))


def sinusoids(positions: int, features: int) -> np.ndarray:
    """Return sines (even features) and cosines (odd ones) of positions (arXiv:1706.03762, section 3.5).

    Args:
        positions: how many.
        features: size of a vector.

    Returns:
        float32 `[positions, features]`.
    """
    pairs = np.arange(features) // 2
    angles = np.arange(positions)[:, None] / 10000 ** (2 * pairs / features)
    return np.where(np.arange(features) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


@register_module(TaskType.MASKED_LM, config=DistilBertConfig)
class DistilBertForMaskedLM(MaskedLM):
    """DistilBERT that fills in masked tokens."""

    backbone_class = DistilBertModel
    base_model_prefix = "distilbert"
    decoder_has_bias = False
    weight_map = (
        WeightRule("vocab_transform", "transform", None),
        WeightRule("vocab_layer_norm", "transform_norm", None),
        WeightRule("vocab_projector", "decoder", None),
        WeightRule("vocab_projector.bias", "vocab_bias"),
    )

    def transform_settings(self) -> tuple[str, float]:
        """Return the transform's activation and the epsilon of its norm."""
        return self.config.activation, EPSILON

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: the head's weight."""
        if not self.config.tie_word_embeddings:
            return {}
        return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=DistilBertConfig)
class DistilBertForSequenceClassification(FirstTokenClassifier):
    """DistilBERT with a classification head of two layers on the first token."""

    backbone_class = DistilBertModel
    base_model_prefix = "distilbert"
    act = "relu"
    drops_inputs = False
    weight_map = (WeightRule("pre_classifier", "dense", None),)

    @property
    def head_dropout(self) -> float:
        """The rate of dropout before the classifier."""
        return self.config.seq_classif_dropout


@register_module(TaskType.TOKEN_CLASSIFICATION, config=DistilBertConfig)
class DistilBertForTokenClassification(TokenClassifier):
    """DistilBERT with a classification head on every token."""

    backbone_class = DistilBertModel
    base_model_prefix = "distilbert"

    @property
    def head_dropout(self) -> float:
        """The rate of dropout before the classifier."""
        return self.config.dropout


@register_module(TaskType.QUESTION_ANSWERING, config=DistilBertConfig)
class DistilBertForQuestionAnswering(QuestionAnswering):
    """DistilBERT that marks where an answer begins and ends."""

    backbone_class = DistilBertModel
    base_model_prefix = "distilbert"

    def _add_head(self, rngs: nnx.Rngs) -> None:
        super()._add_head(rngs)
        self.dropout = make_dropout(self.config.qa_dropout, rngs)

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Return the hidden states `[batch, seq, hidden]`, some of them dropped in training."""
        return self.dropout(hidden)


@register_module(TaskType.EMBEDDING, config=DistilBertConfig)
class DistilBertForEmbedding(Embedding):
    """DistilBERT with one vector for each sequence, as sentence-transformers' models have them."""

    backbone_class = DistilBertModel
    base_model_prefix = "distilbert"
