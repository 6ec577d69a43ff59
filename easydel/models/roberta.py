"""RoBERTa (arXiv:1907.11692): BERT whose positions begin after the padding token's id, and whose heads are its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.models.bert import BertEncoder, BertModel
from easydel.models.encoder import encoder_rules
from easydel.models.inputs import place_tokens
from easydel.models.tasks import Embedding, FirstTokenClassifier, MaskedLM, QuestionAnswering, TokenClassifier
from easydel.sharding import PartitionRules


@register_config("roberta")
class RobertaConfig(EasyDeLBaseConfig, transformers.RobertaConfig):
    """Fields of `transformers.RobertaConfig`, this library's runtime settings, and how `RobertaForEmbedding` pools.

    Attributes:
        embedding_pooling: `"mean"`, `"cls"` or `"last"`.
        embedding_normalize: whether embeddings are scaled to length one.
    """

    embedding_pooling: str = "mean"
    embedding_normalize: bool = True

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return encoder_rules()


class RobertaEncoder(BertEncoder):
    """The backbone without the pooler: tokens have the positions from `pad_token_id + 1` on, padding has its own id."""

    base_model_prefix = "roberta"

    def __init__(
        self,
        config: RobertaConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if config.pad_token_id is None:
            raise UnsupportedError("RoBERTa's positions begin after pad_token_id: set it in the config, got None")
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed_positions.padding_idx = config.pad_token_id

    @property
    def longest_sequence(self) -> int:
        """The longest sequence the model can take: one of the positions left for each token."""
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def count(
        self,
        positions: jax.Array,
        tokens: jax.Array | None,
        input_ids: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Count the tokens that are not `pad_token_id`; without ids, those that the mask keeps."""
        padding = self.config.pad_token_id
        kept = tokens
        if input_ids is not None:
            others = jnp.asarray(input_ids) != padding
            kept = others if tokens is None else others & tokens
        if kept is None:
            return positions + padding + 1
        counted = place_tokens(kept, segment_ids, None, *kept.shape)[-1]
        return jnp.where(kept, counted + padding + 1, padding)


@register_module(TaskType.BASE, config=RobertaConfig)
class RobertaModel(RobertaEncoder, BertModel):
    """The RoBERTa backbone; `pooler_output` `[batch, hidden]` is made of each row's first token."""

    harmless_extras = (r"embeddings\.position_ids$",)


@register_module(TaskType.MASKED_LM, config=RobertaConfig)
class RobertaForMaskedLM(MaskedLM):
    """RoBERTa that fills in masked tokens."""

    backbone_class = RobertaEncoder
    base_model_prefix = "roberta"
    weight_map = (
        WeightRule("lm_head.dense", "transform", None),
        WeightRule("lm_head.layer_norm", "transform_norm", None),
        WeightRule("lm_head.decoder", "decoder", None),
        WeightRule("lm_head.bias", "vocab_bias"),
    )

    def transform_settings(self) -> tuple[str, float]:
        """Return the transform's activation, whatever the blocks have, and the epsilon of its norm."""
        return "gelu", self.config.layer_norm_eps

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: the decoder's weight and bias."""
        if not self.config.tie_word_embeddings:
            return {}
        return {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=RobertaConfig)
class RobertaForSequenceClassification(FirstTokenClassifier):
    """RoBERTa with a classification head of two layers on the first token."""

    backbone_class = RobertaEncoder
    base_model_prefix = "roberta"
    weight_map = (WeightRule("classifier.dense", "dense", None), WeightRule("classifier.out_proj", "classifier", None))


@register_module(TaskType.TOKEN_CLASSIFICATION, config=RobertaConfig)
class RobertaForTokenClassification(TokenClassifier):
    """RoBERTa with a classification head on every token."""

    backbone_class = RobertaEncoder
    base_model_prefix = "roberta"


@register_module(TaskType.QUESTION_ANSWERING, config=RobertaConfig)
class RobertaForQuestionAnswering(QuestionAnswering):
    """RoBERTa that marks where an answer begins and ends."""

    backbone_class = RobertaEncoder
    base_model_prefix = "roberta"


@register_module(TaskType.EMBEDDING, config=RobertaConfig)
class RobertaForEmbedding(Embedding):
    """RoBERTa with one vector for each sequence, as sentence-transformers' models have them."""

    backbone_class = RobertaEncoder
    base_model_prefix = "roberta"
