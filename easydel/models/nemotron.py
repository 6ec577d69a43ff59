"""Nemotron (arXiv:2402.16819): LayerNorm stored as a distance from one, squared ReLUs, half of each head rotated."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, OffsetLayerNorm, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("nemotron")
class NemotronConfig(EasyDeLBaseConfig, transformers.NemotronConfig):
    """Fields of `transformers.NemotronConfig`, and this library's runtime settings."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:  # type: ignore[has-type]  # transformers' model cannot be built then
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


def nemotron_norm(features: int, *, epsilon: float, dtype: Any, param_dtype: Any) -> OffsetLayerNorm:
    """Make a norm; a new one stores a scale of one, as transformers' does, and so multiplies by two."""
    return OffsetLayerNorm(features, epsilon=epsilon, init_scale=2.0, dtype=dtype, param_dtype=param_dtype)


class NemotronBlock(PreNormBlock):
    """One layer."""

    def __init__(
        self, config: NemotronConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = config.attention_bias
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options),
            MLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.norm_eps,
            norm=nemotron_norm,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=NemotronConfig)
class NemotronModel(Decoder):
    """The Nemotron backbone."""

    block_class = NemotronBlock
    partial_rotary = True

    def make_norm(self) -> OffsetLayerNorm:
        """Make the norm after the last layer."""
        return nemotron_norm(self.config.hidden_size, epsilon=self.config.norm_eps, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=NemotronConfig)
class NemotronForCausalLM(CausalLM):
    """Nemotron with a language-model head."""

    backbone_class = NemotronModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=NemotronConfig)
class NemotronForSequenceClassification(SequenceClassifier):
    """Nemotron with a classification head on the last token."""

    backbone_class = NemotronModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=NemotronConfig)
class NemotronForTokenClassification(DecoderTokenClassifier):
    """Nemotron with a classification head on every token."""

    backbone_class = NemotronModel


@register_module(TaskType.QUESTION_ANSWERING, config=NemotronConfig)
class NemotronForQuestionAnswering(QuestionAnswering):
    """Nemotron with a head that marks the answer to a question."""

    backbone_class = NemotronModel
    base_model_prefix = "transformer"
