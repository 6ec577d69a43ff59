"""BERT (arXiv:1810.04805): post-norm blocks that look both ways, learned positions, pairs of sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, LayerInputs, LayerOutput, Linear, layer_norm, make_dropout
from easydel.layers.linear import normal_init
from easydel.models.encoder import Encoder, encoder_rules, first_token
from easydel.models.tasks import Embedding, MaskedLM, PooledClassifier, QuestionAnswering, TokenClassifier
from easydel.sharding import PartitionRules


@register_config("bert")
class BertConfig(EasyDeLBaseConfig, transformers.BertConfig):
    """Fields of `transformers.BertConfig`, this library's runtime settings, and how `BertForEmbedding` pools.

    Attributes:
        embedding_pooling: `"mean"`, `"cls"` or `"last"`.
        embedding_normalize: whether embeddings are scaled to length one.
    """

    embedding_pooling: str = "mean"
    embedding_normalize: bool = True

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return encoder_rules()


class BertBlock(nnx.Module):
    """One layer: attention and MLP, each with a norm *after* its residual."""

    def __init__(self, config: BertConfig, kind: str, *, rngs: nnx.Rngs, **options: Any) -> None:
        del kind  # all layers are alike
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={config.num_attention_heads} must divide hidden_size={config.hidden_size}"
            )
        norm = {"epsilon": config.layer_norm_eps, **options}
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
            qkv_bias=True,
            out_bias=True,
            causal=False,
            mechanism=config.attn_mechanism,
            block_size=config.attn_block_size,
            dropout=config.attention_probs_dropout_prob,
            init_stddev=config.initializer_range,
            rngs=rngs,
            **options,
        )
        self.attention_norm = layer_norm(config.hidden_size, **norm)
        self.mlp = MLP(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            init_stddev=config.initializer_range,
            rngs=rngs,
            **options,
        )
        self.output_norm = layer_norm(config.hidden_size, **norm)
        self.dropout = make_dropout(config.hidden_dropout_prob, rngs)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the attention weights."""
        out = self.self_attn(hidden, inputs, cache)
        hidden = self.attention_norm(hidden + self.dropout(out.hidden))
        return out.replace(hidden=self.output_norm(hidden + self.dropout(self.mlp(hidden))))


class BertEncoder(Encoder):
    """The backbone without the pooler, as under the heads that look at every token."""

    block_class = BertBlock
    base_model_prefix = "bert"
    has_types = True
    # A buffer that older files hold, and a pooler that nothing here would read.
    harmless_extras: ClassVar[tuple[str, ...]] = (r"embeddings\.position_ids$", r"pooler\.dense\.(weight|bias)$")
    legacy_names = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
    weight_map = (
        WeightRule("embeddings.word_embeddings", "embed_tokens", None),
        WeightRule("embeddings.position_embeddings", "embed_positions", None),
        WeightRule("embeddings.token_type_embeddings", "embed_types", None),
        WeightRule("embeddings.LayerNorm", "embed_norm", None),
        WeightRule("attention.self.query", "self_attn/q_proj", None),
        WeightRule("attention.self.key", "self_attn/k_proj", None),
        WeightRule("attention.self.value", "self_attn/v_proj", None),
        WeightRule("attention.output.dense", "self_attn/o_proj", None),
        WeightRule("attention.output.LayerNorm", "attention_norm", None),
        WeightRule("intermediate.dense", "mlp/up_proj", None),
        WeightRule("output.dense", "mlp/down_proj", None),
        WeightRule("output.LayerNorm", "output_norm", None),
        WeightRule("encoder.layer", "layers", None),
        WeightRule("pooler.dense", "pooler", None),
    )

    def __init__(
        self,
        config: BertConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        _refuse_unsupported(config)
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed_positions = self.table(config.max_position_embeddings, rngs)
        self.embed_types = self.table(config.type_vocab_size, rngs)
        self.embed_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **self.dtypes)
        self.dropout = make_dropout(config.hidden_dropout_prob, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Add the vectors of the tokens' types and positions, and normalise."""
        hidden = hidden + self.embed_types(token_type_ids) + self.embed_positions(positions)
        return self.dropout(self.embed_norm(hidden))


@register_module(TaskType.BASE, config=BertConfig)
class BertModel(BertEncoder):
    """The BERT backbone; `pooler_output` `[batch, hidden]` is made of each row's first token."""

    harmless_extras = (r"embeddings\.position_ids$",)

    def __init__(
        self,
        config: BertConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.pooler = Linear(
            config.hidden_size,
            config.hidden_size,
            roles=("mlp", None),
            kernel_init=normal_init(config.initializer_range),
            precision=precision,
            rngs=rngs,
            **self.dtypes,
        )

    def pool(self, hidden: jax.Array, tokens: jax.Array | None) -> jax.Array:
        """Return `tanh(pooler(first token))`, `[batch, hidden]`."""
        return jnp.tanh(self.pooler(first_token(hidden, tokens)))


@register_module(TaskType.MASKED_LM, config=BertConfig)
class BertForMaskedLM(MaskedLM):
    """BERT that fills in masked tokens."""

    backbone_class = BertEncoder
    base_model_prefix = "bert"
    harmless_extras = (r"^cls\.seq_relationship\.(weight|bias)$",)  # the other half of pre-training
    weight_map = (
        WeightRule("cls.predictions.transform.dense", "transform", None),
        WeightRule("cls.predictions.transform.LayerNorm", "transform_norm", None),
        WeightRule("cls.predictions.decoder", "decoder", None),
        WeightRule("cls.predictions.bias", "vocab_bias"),
    )

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: the decoder's weight and bias."""
        if not self.config.tie_word_embeddings:
            return {}
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=BertConfig)
class BertForSequenceClassification(PooledClassifier):
    """BERT with a classification head on the pooled first token."""

    backbone_class = BertModel
    base_model_prefix = "bert"


@register_module(TaskType.TOKEN_CLASSIFICATION, config=BertConfig)
class BertForTokenClassification(TokenClassifier):
    """BERT with a classification head on every token."""

    backbone_class = BertEncoder
    base_model_prefix = "bert"


@register_module(TaskType.QUESTION_ANSWERING, config=BertConfig)
class BertForQuestionAnswering(QuestionAnswering):
    """BERT that marks where an answer begins and ends."""

    backbone_class = BertEncoder
    base_model_prefix = "bert"


@register_module(TaskType.EMBEDDING, config=BertConfig)
class BertForEmbedding(Embedding):
    """BERT with one vector for each sequence, as sentence-transformers' models have them."""

    backbone_class = BertEncoder
    base_model_prefix = "bert"


def _refuse_unsupported(config: BertConfig) -> None:
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name):
            raise UnsupportedError(
                f"{name}=True is not supported by {config.model_type.upper()} models here: they are encoders"
            )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":  # a field of older configs; the current transformers knows only this value
        raise UnsupportedError(f"position_embedding_type={positions!r} is not supported; only 'absolute' is")
