"""StarCoder2 (arXiv:2402.19173): LayerNorm, an MLP of two matrices, biases, and a window in every layer."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, PreNormBlock, attention_fields, layer_norm, make_dropout, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("starcoder2")
class Starcoder2Config(EasyDeLBaseConfig, transformers.Starcoder2Config):
    """Fields of `transformers.Starcoder2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Starcoder2Block(PreNormBlock):
    """One layer; all have the same window, if there is one."""

    def __init__(
        self, config: Starcoder2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, window = config.use_bias, config.sliding_window
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, window=window, **options),
            MLP(**mlp_fields(config), use_bias=bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.norm_epsilon,
            norm=layer_norm,
            dropout=(config.residual_dropout, config.residual_dropout),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=Starcoder2Config)
class Starcoder2Model(Decoder):
    """The StarCoder2 backbone."""

    block_class = Starcoder2Block
    weight_map = (WeightRule("mlp.c_fc", "mlp/up_proj", None), WeightRule("mlp.c_proj", "mlp/down_proj", None))

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.norm_epsilon, **self.dtypes)

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the dropout after the embeddings."""
        self.dropout = make_dropout(self.config.embedding_dropout, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Drop some of the embeddings' features."""
        del positions
        return self.dropout(hidden)


@register_module(TaskType.CAUSAL_LM, config=Starcoder2Config)
class Starcoder2ForCausalLM(CausalLM):
    """StarCoder2 with a language-model head."""

    backbone_class = Starcoder2Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Starcoder2Config)
class Starcoder2ForSequenceClassification(SequenceClassifier):
    """StarCoder2 with a classification head on the last token."""

    backbone_class = Starcoder2Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Starcoder2Config)
class Starcoder2ForTokenClassification(DecoderTokenClassifier):
    """StarCoder2 with a classification head on every token."""

    backbone_class = Starcoder2Model
