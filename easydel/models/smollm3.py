"""SmolLM3: Llama's block, with layers now and then whose queries and keys are not rotated (arXiv:2501.18795)."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules, layer_types, window_of
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("smollm3")
class SmolLM3Config(EasyDeLBaseConfig, transformers.SmolLM3Config):
    """Fields of `transformers.SmolLM3Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class SmolLM3Block(PreNormBlock):
    """One layer, full or sliding, rotated or not."""

    def __init__(
        self, config: SmolLM3Config, kind: tuple[str, bool], *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        layer_type, rotates = kind
        bias, window = config.attention_bias, window_of(config, layer_type)
        super().__init__(
            Attention(
                **attention_fields(config), qkv_bias=bias, out_bias=bias, window=window, rotates=rotates, **options
            ),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=SmolLM3Config)
class SmolLM3Model(Decoder):
    """The SmolLM3 backbone."""

    block_class = SmolLM3Block

    @staticmethod
    def layer_kinds(config: SmolLM3Config) -> list[tuple[str, bool]]:
        """Return for each layer its type and whether it rotates.

        Raises:
            ValueError: `no_rope_layers` is shorter than the model.
        """
        rotated, count = config.no_rope_layers, config.num_hidden_layers
        if len(rotated) < count:
            raise ValueError(f"no_rope_layers has {len(rotated)} entries for num_hidden_layers={count}: give one each")
        return [(kind, bool(rotates)) for kind, rotates in zip(layer_types(config), rotated, strict=False)]


@register_module(TaskType.CAUSAL_LM, config=SmolLM3Config)
class SmolLM3ForCausalLM(CausalLM):
    """SmolLM3 with a language-model head."""

    backbone_class = SmolLM3Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=SmolLM3Config)
class SmolLM3ForSequenceClassification(SequenceClassifier):
    """SmolLM3 with a classification head on the last token."""

    backbone_class = SmolLM3Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=SmolLM3Config)
class SmolLM3ForTokenClassification(DecoderTokenClassifier):
    """SmolLM3 with a classification head on every token."""

    backbone_class = SmolLM3Model


@register_module(TaskType.QUESTION_ANSWERING, config=SmolLM3Config)
class SmolLM3ForQuestionAnswering(QuestionAnswering):
    """SmolLM3 with a head that marks the answer to a question."""

    backbone_class = SmolLM3Model
    base_model_prefix = "transformer"
