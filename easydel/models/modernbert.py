"""ModernBERT (arXiv:2412.13663): pre-norm blocks that look both ways, far or near by turns, with rotary positions."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import TRANSPOSE, Split, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedMLP,
    LayerInputs,
    LayerOutput,
    Linear,
    RotaryByKind,
    RotaryEmbedding,
    activation,
    layer_norm,
    make_dropout,
)
from easydel.layers.linear import Spread, truncated_init
from easydel.models.decoder import layer_types
from easydel.models.encoder import Encoder, encoder_rules
from easydel.models.tasks import Embedding, MaskedLM, QuestionAnswering, TaskModule, TokenClassifier
from easydel.models.tasks.classification import Classifier
from easydel.models.tasks.embedding import pool
from easydel.outputs import SequenceClassifierOutput
from easydel.sharding import PartitionRules

PRE_TRAINING = (r"^decoder\.(weight|bias)$",)
"""The last layer of pre-training, which other tasks leave out: no name of theirs begins so."""


@register_config("modernbert")
class ModernBertConfig(EasyDeLBaseConfig, transformers.ModernBertConfig):
    """Fields of `transformers.ModernBertConfig`, this library's runtime settings, and how `…ForEmbedding` pools.

    Attributes:
        embedding_pooling: `"mean"`, `"cls"` or `"last"`.
        embedding_normalize: whether embeddings are scaled to length one.
    """

    embedding_pooling: str = "mean"
    embedding_normalize: bool = True

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return encoder_rules()


def spread(config: ModernBertConfig, *, out: bool = False) -> Spread:
    """Return what draws new weights; `out`: of layers whose results are added to the stream, or of a head."""
    scale = (2.0 * config.num_hidden_layers) ** -0.5 if out else 1.0
    return truncated_init(config.initializer_range * scale, config.initializer_cutoff_factor)


def make_norm(config: ModernBertConfig, **dtypes: Any) -> nnx.LayerNorm:
    """Make one of the norms, all alike."""
    return layer_norm(config.hidden_size, config.norm_eps, use_bias=config.norm_bias, **dtypes)


class ModernBertBlock(nnx.Module):
    """One layer; the first has no norm before its attention, since the embeddings have one.

    Args:
        config: of the model.
        kind: `"full_attention"` or `"sliding_attention"`, and whether there is a norm before attention.
    """

    def __init__(self, config: ModernBertConfig, kind: tuple[str, bool], **options: Any) -> None:
        size, heads = config.hidden_size, config.num_attention_heads
        if size % heads:
            raise ValueError(f"num_attention_heads={heads} must divide hidden_size={size}")
        self.layer_type, is_normed = kind
        into, out = spread(config), spread(config, out=True)
        self.attn_norm = make_norm(config, **options) if is_normed else None
        self.self_attn = Attention(
            size,
            heads,
            heads,
            size // heads,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            causal=False,
            # Half of the window lies on each side of a token.
            window=config.local_attention // 2 + 1 if self.layer_type == "sliding_attention" else None,
            mechanism=config.attn_mechanism,
            block_size=config.attn_block_size,
            dropout=config.attention_dropout,
            init_stddev={"q_proj": into, "k_proj": into, "v_proj": into, "o_proj": out},
            **options,
        )
        self.dropout = make_dropout(config.attention_dropout, options["rngs"])
        self.mlp_norm = make_norm(config, **options)
        self.mlp = GatedMLP(
            size,
            config.intermediate_size,
            act=config.hidden_activation,
            use_bias=config.mlp_bias,
            dropout=config.mlp_dropout,
            init_stddev={"gate_proj": into, "up_proj": into, "down_proj": out},
            **options,
        )

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the attention weights."""
        inputs = inputs.replace(rotary=inputs.rotary[self.layer_type])
        out = self.self_attn(hidden if self.attn_norm is None else self.attn_norm(hidden), inputs, cache)
        hidden = hidden + self.dropout(out.hidden)
        return out.replace(hidden=hidden + self.mlp(self.mlp_norm(hidden)))


class ModernBertEncoder(Encoder):
    """The backbone, as under heads."""

    block_class = ModernBertBlock
    weight_map = (
        WeightRule("embeddings.tok_embeddings", "embed_tokens", None),
        WeightRule("embeddings.norm", "embed_norm", None),
        WeightRule("attn.Wqkv.weight", tuple(f"self_attn/{n}_proj/kernel" for n in "qkv"), Split(0, TRANSPOSE)),
        WeightRule("attn.Wqkv.bias", tuple(f"self_attn/{n}_proj/bias" for n in "qkv"), Split()),
        WeightRule("attn.Wo", "self_attn/o_proj", None),
        WeightRule("mlp.Wi.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), Split(0, TRANSPOSE)),
        WeightRule("mlp.Wi.bias", ("mlp/gate_proj/bias", "mlp/up_proj/bias"), Split()),
        WeightRule("mlp.Wo", "mlp/down_proj", None),
    )

    def __init__(
        self,
        config: ModernBertConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed_norm, self.final_norm = (make_norm(config, **self.dtypes) for _ in range(2))
        self.dropout = make_dropout(config.embedding_dropout, rngs)

    @staticmethod
    def layer_kinds(config: ModernBertConfig) -> list[Any]:
        """Return how far each layer sees, and whether it has a norm before its attention."""
        return [(kind, place > 0) for place, kind in enumerate(layer_types(config))]

    @property
    def longest_sequence(self) -> None:
        """The longest sequence the model can take: any."""
        return None

    @property
    def table_stddev(self) -> Spread:
        """What draws new tables."""
        return spread(self.config)

    def make_rotary(self) -> RotaryByKind:
        """Make the rotary positions of each kind of layer."""
        config = self.config
        make = partial(
            RotaryEmbedding,
            head_dim=config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            partial=False,
        )
        return RotaryByKind(
            tuple((kind, make(config.rope_parameters[kind])) for kind in sorted(set(layer_types(config))))
        )

    def place(self, hidden: jax.Array, positions: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Normalise: positions are rotations."""
        del positions, token_type_ids
        return self.dropout(self.embed_norm(hidden))

    def finish(self, hidden: jax.Array) -> jax.Array:
        """Normalise what the last layer gives, `[batch, seq, hidden]`."""
        return self.final_norm(hidden)


@register_module(TaskType.BASE, config=ModernBertConfig)
class ModernBertModel(ModernBertEncoder):
    """The ModernBERT backbone."""

    harmless_extras = PRE_TRAINING


class PredictionHead(nnx.Module):
    """`norm(act(dense(x)))`, between the backbone and the last layer of every task."""

    def __init__(self, config: ModernBertConfig, *, precision: Any, rngs: nnx.Rngs, **dtypes: Any) -> None:
        self.dense = Linear(
            config.hidden_size,
            config.hidden_size,
            roles=("mlp", None),
            use_bias=config.classifier_bias,
            kernel_init=spread(config, out=True),
            precision=precision,
            rngs=rngs,
            **dtypes,
        )
        self.norm = make_norm(config, **dtypes)
        self.act = activation(config.classifier_activation)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Map `[..., hidden]` to the same shape."""
        return self.norm(self.act(self.dense(hidden)))


class ModernBertTask(TaskModule):
    """A task of ModernBERT: its head is given what `prediction_head` makes of the backbone's states."""

    backbone_class = ModernBertEncoder
    weight_map: ClassVar[tuple[WeightRule, ...]] = (WeightRule("head", "prediction_head", None),)
    harmless_extras: ClassVar[tuple[str, ...]] = PRE_TRAINING

    def _add_head(self, rngs: nnx.Rngs) -> None:
        super()._add_head(rngs)
        self._add_prediction_head(rngs)

    def _add_prediction_head(self, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.prediction_head = PredictionHead(self.config, precision=self.precision, rngs=rngs, **dtypes)

    @property
    def head_stddev(self) -> Spread:
        """What draws a classifier's new weights."""
        return truncated_init(self.config.hidden_size**-0.5, self.config.initializer_cutoff_factor)

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Map the backbone's hidden states `[..., hidden]` to what the last layer is given."""
        return self.prediction_head(hidden)


@register_module(TaskType.MASKED_LM, config=ModernBertConfig)
class ModernBertForMaskedLM(ModernBertTask, MaskedLM):
    """ModernBERT that fills in masked tokens; all logits are computed, whatever the labels."""

    harmless_extras = ()
    weight_map = (*ModernBertTask.weight_map, WeightRule("decoder.bias", "vocab_bias"))

    def _add_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        if config.sparse_prediction:
            raise UnsupportedError(
                "sparse_prediction=True is not supported: how many logits there are would depend on the labels; "
                "set it to False, the loss is the same"
            )
        self._add_prediction_head(rngs)
        if config.decoder_bias:
            self.vocab_bias = nnx.Param(jnp.zeros((config.vocab_size,), self.param_dtype))
        if not config.tie_word_embeddings:
            self.decoder = self._linear(config.vocab_size, rngs, stddev=spread(config, out=True), roles=(None, "vocab"))

    def head_bias(self) -> jax.Array | None:
        """Return what is added to the logits, if there is such a bias."""
        return self.vocab_bias.get_value() if self.config.decoder_bias else None

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: the head's weight."""
        if not self.config.tie_word_embeddings:
            return {}
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"}


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=ModernBertConfig)
class ModernBertForSequenceClassification(ModernBertTask, Classifier):
    """ModernBERT with a classification head on each row's first token, or on the mean of its tokens."""

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> SequenceClassifierOutput:
        """Turn the backbone's output into logits `[batch, labels]`."""
        mask = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        pooled = pool(out.last_hidden_state, mask, self.config.classifier_pooling).astype(self.dtype)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(self.head_input(pooled))), **out.carried())


@register_module(TaskType.TOKEN_CLASSIFICATION, config=ModernBertConfig)
class ModernBertForTokenClassification(ModernBertTask, TokenClassifier):
    """ModernBERT with a classification head on every token."""


@register_module(TaskType.QUESTION_ANSWERING, config=ModernBertConfig)
class ModernBertForQuestionAnswering(ModernBertTask, QuestionAnswering):
    """ModernBERT that marks where an answer begins and ends."""

    weight_map = (*ModernBertTask.weight_map, WeightRule("classifier", "qa_outputs", None))

    def _add_head(self, rngs: nnx.Rngs) -> None:
        super()._add_head(rngs)
        self.dropout = make_dropout(self.config.classifier_dropout, rngs)

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Map the backbone's hidden states `[batch, seq, hidden]` to what the last layer is given."""
        return self.dropout(self.prediction_head(hidden))


@register_module(TaskType.EMBEDDING, config=ModernBertConfig)
class ModernBertForEmbedding(Embedding):
    """ModernBERT with one vector for each sequence, as sentence-transformers' models have them."""

    backbone_class = ModernBertEncoder
    harmless_extras = PRE_TRAINING
