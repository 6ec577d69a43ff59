"""Mixtral (arXiv:2401.04088): Mistral's block with a mixture of experts in place of the MLP."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers

from easydel.hub.weight_map import TRANSPOSE, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, PreNormBlock, SparseMoE, attention_fields, mlp_fields
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights
from easydel.models.tasks import MoECausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("mixtral")
class MixtralConfig(EasyDeLBaseConfig, transformers.MixtralConfig):
    """Fields of `transformers.MixtralConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and their width over `tp`, the other side over `fsdp`."""
        return expert_rules()


class MixtralBlock(PreNormBlock):
    """One layer; all have the same window, whatever `layer_types` says."""

    def __init__(self, config: MixtralConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(**attention_fields(config), window=config.sliding_window, **options),
            SparseMoE(
                **mlp_fields(config),
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                jitter=config.router_jitter_noise,
                mechanism=config.moe_mechanism,
                **options,
            ),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=MixtralConfig)
class MixtralModel(MoEDecoder):
    """The Mixtral backbone."""

    block_class = MixtralBlock
    weight_map: ClassVar[tuple[WeightRule, ...]] = (
        *expert_weights(("w1", "w3", "w2"), module="block_sparse_moe"),
        WeightRule("block_sparse_moe.gate.weight", "mlp/gate/kernel", TRANSPOSE, form="file"),
    )


@register_module(TaskType.CAUSAL_LM, config=MixtralConfig)
class MixtralForCausalLM(MoECausalLM):
    """Mixtral with a language-model head."""

    backbone_class = MixtralModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=MixtralConfig)
class MixtralForSequenceClassification(SequenceClassifier):
    """Mixtral with a classification head on the last token."""

    backbone_class = MixtralModel
