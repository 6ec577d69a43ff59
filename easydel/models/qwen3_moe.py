"""Qwen3 MoE (arXiv:2505.09388): Qwen3's attention, and a mixture of experts in all or some of the layers."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, RMSNorm, SparseMoE, attention_fields, mlp_fields
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights, sparse_layers
from easydel.models.tasks import DecoderTokenClassifier, MoECausalLM, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("qwen3_moe")
class Qwen3MoeConfig(EasyDeLBaseConfig, transformers.Qwen3MoeConfig):
    """Fields of `transformers.Qwen3MoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class Qwen3MoeBlock(PreNormBlock):
    """One layer, with experts or without; all have the same window."""

    def __init__(self, config: Qwen3MoeConfig, sparse: bool, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, bias = attention_fields(config), config.attention_bias

        def head_norm() -> RMSNorm:
            return RMSNorm(fields["head_dim"], epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        super().__init__(
            Attention(
                **fields, qkv_bias=bias, out_bias=bias, window=config.sliding_window, qk_norm=head_norm, **options
            ),
            _experts(config, **options) if sparse else GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


def _experts(config: Qwen3MoeConfig, **options: Any) -> SparseMoE:
    return SparseMoE(
        **mlp_fields(config) | {"intermediate_size": config.moe_intermediate_size},
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        mechanism=config.moe_mechanism,
        **options,
    )


@register_module(TaskType.BASE, config=Qwen3MoeConfig)
class Qwen3MoeModel(MoEDecoder):
    """The Qwen3 MoE backbone."""

    block_class = Qwen3MoeBlock
    layer_kinds = staticmethod(sparse_layers)
    weight_map = expert_weights()


@register_module(TaskType.CAUSAL_LM, config=Qwen3MoeConfig)
class Qwen3MoeForCausalLM(MoECausalLM):
    """Qwen3 MoE with a language-model head."""

    backbone_class = Qwen3MoeModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Qwen3MoeConfig)
class Qwen3MoeForSequenceClassification(SequenceClassifier):
    """Qwen3 MoE with a classification head on the last token."""

    backbone_class = Qwen3MoeModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Qwen3MoeConfig)
class Qwen3MoeForTokenClassification(DecoderTokenClassifier):
    """Qwen3 MoE with a classification head on every token."""

    backbone_class = Qwen3MoeModel


@register_module(TaskType.QUESTION_ANSWERING, config=Qwen3MoeConfig)
class Qwen3MoeForQuestionAnswering(QuestionAnswering):
    """Qwen3 MoE that marks the answer to a question."""

    backbone_class = Qwen3MoeModel
    base_model_prefix = "transformer"
