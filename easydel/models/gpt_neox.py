"""GPT-NeoX (arXiv:2204.06745), Pythia: attention and MLP side by side, each behind a norm; heads rotated in part."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.hub.transforms import TRANSPOSE, GroupedSplit
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, PreNormBlock, attention_fields, layer_norm, make_dropout, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, QuestionAnswering, SequenceClassifier, TokenClassifier
from easydel.sharding import PartitionRules


@register_config("gpt_neox")
class GPTNeoXConfig(EasyDeLBaseConfig, transformers.GPTNeoXConfig):
    """Fields of `transformers.GPTNeoXConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GPTNeoXBlock(PreNormBlock):
    """One layer."""

    def __init__(self, config: GPTNeoXConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options),
            MLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.layer_norm_eps,
            norm=layer_norm,
            parallel=config.use_parallel_residual,
            two_norms=True,
            dropout=(config.hidden_dropout, config.hidden_dropout),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=GPTNeoXConfig)
class GPTNeoXModel(Decoder):
    """The GPT-NeoX backbone."""

    block_class = GPTNeoXBlock
    base_model_prefix = "gpt_neox"
    has_padding_token = False
    partial_rotary = True
    legacy_names = ((r"^embed_out\.", "lm_head."),)
    harmless_extras = (r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")

    @property
    def weight_map(self) -> tuple[WeightRule, ...]:
        """The names in files, where queries, keys and values are one, head by head."""
        fused, heads = "attention.query_key_value", self.config.num_attention_heads
        kernels, biases = (tuple(f"self_attn/{n}_proj/{leaf}" for n in "qkv") for leaf in ("kernel", "bias"))
        return (
            WeightRule(f"{fused}.weight", kernels, GroupedSplit(heads, TRANSPOSE)),
            WeightRule(f"{fused}.bias", biases, GroupedSplit(heads)),
            WeightRule("attention.dense", "self_attn/o_proj", None),
            WeightRule("mlp.dense_h_to_4h", "mlp/up_proj", None),
            WeightRule("mlp.dense_4h_to_h", "mlp/down_proj", None),
            WeightRule("final_layer_norm", "norm", None),
            WeightRule("embed_in", "embed_tokens", None),
        )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.layer_norm_eps, **self.dtypes)

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the dropout after the embeddings."""
        self.dropout = make_dropout(self.config.hidden_dropout, rngs)

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Drop some of the embeddings' features."""
        del positions
        return self.dropout(hidden)


@register_module(TaskType.CAUSAL_LM, config=GPTNeoXConfig)
class GPTNeoXForCausalLM(CausalLM):
    """GPT-NeoX with a language-model head."""

    backbone_class = GPTNeoXModel
    base_model_prefix = "gpt_neox"
    tied_weight = "embed_in.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GPTNeoXConfig)
class GPTNeoXForSequenceClassification(SequenceClassifier):
    """GPT-NeoX with a classification head on the last token."""

    backbone_class = GPTNeoXModel
    base_model_prefix = "gpt_neox"


@register_module(TaskType.TOKEN_CLASSIFICATION, config=GPTNeoXConfig)
class GPTNeoXForTokenClassification(TokenClassifier):
    """GPT-NeoX with a classification head on every token."""

    backbone_class = GPTNeoXModel
    base_model_prefix = "gpt_neox"


@register_module(TaskType.QUESTION_ANSWERING, config=GPTNeoXConfig)
class GPTNeoXForQuestionAnswering(QuestionAnswering):
    """GPT-NeoX with a head that marks the answer to a question."""

    backbone_class = GPTNeoXModel
    base_model_prefix = "gpt_neox"
