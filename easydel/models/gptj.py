"""GPT-J (Wang and Komatsuzaki, 2021): attention and MLP side by side behind one LayerNorm, neighbours rotated."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    MLP,
    Attention,
    PreNormBlock,
    RotaryEmbedding,
    head_size,
    layer_norm,
    make_dropout,
)
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import BiasedCausalLM, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gptj")
class GPTJConfig(EasyDeLBaseConfig, transformers.GPTJConfig):
    """Fields of `transformers.GPTJConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GPTJBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: GPTJConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        size, stddev = head_size(config.n_embd, config.n_head), config.initializer_range
        if config.rotary_dim not in range(2, size + 1, 2):
            raise ValueError(f"rotary_dim={config.rotary_dim} must be even, above 0 and at most {size}, a head's size")
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        super().__init__(
            Attention(
                config.n_embd,
                config.n_head,
                config.n_head,
                size,
                interleaved=True,
                mechanism=config.attn_mechanism,
                block_size=config.attn_block_size,
                dropout=config.attn_pdrop,
                init_stddev=stddev,
                **options,
            ),
            MLP(config.n_embd, inner, act=config.activation_function, init_stddev=stddev, **options),
            hidden_size=config.n_embd,
            epsilon=config.layer_norm_epsilon,
            norm=layer_norm,
            parallel=True,
            dropout=(config.resid_pdrop, config.resid_pdrop),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=GPTJConfig)
class GPTJModel(Decoder):
    """The GPT-J backbone."""

    block_class = GPTJBlock
    base_model_prefix = "transformer"
    has_padding_token = False
    harmless_extras = (r"attn\.(masked_)?bias$",)
    weight_map = (
        WeightRule("attn.out_proj", "self_attn/o_proj", None),
        WeightRule("attn", "self_attn", None),
        WeightRule("mlp.fc_in", "mlp/up_proj", None),
        WeightRule("mlp.fc_out", "mlp/down_proj", None),
        WeightRule("ln_1", "input_layernorm", None),
        WeightRule("ln_f", "norm", None),
        WeightRule("wte", "embed_tokens", None),
        WeightRule("h", "layers", None),
    )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.n_embd, self.config.layer_norm_epsilon, **self.dtypes)

    def make_rotary(self) -> RotaryEmbedding:
        """Make the rotary positions, of `rotary_dim` features of each head."""
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        longest = self.config.n_positions
        return RotaryEmbedding(plain, head_dim=self.config.rotary_dim, max_position_embeddings=longest)

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the dropout after the embeddings."""
        self.dropout = make_dropout(self.config.embd_pdrop, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Drop some of the embeddings' features."""
        del positions
        return self.dropout(hidden)


@register_module(TaskType.CAUSAL_LM, config=GPTJConfig)
class GPTJForCausalLM(BiasedCausalLM):
    """GPT-J with a language-model head."""

    backbone_class = GPTJModel
    base_model_prefix = "transformer"
    tied_weight = "wte.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GPTJConfig)
class GPTJForSequenceClassification(SequenceClassifier):
    """GPT-J with a classification head on the last token."""

    backbone_class = GPTJModel
    base_model_prefix = "transformer"


@register_module(TaskType.QUESTION_ANSWERING, config=GPTJConfig)
class GPTJForQuestionAnswering(QuestionAnswering):
    """GPT-J with a head that marks the answer to a question."""

    backbone_class = GPTJModel
    base_model_prefix = "transformer"
