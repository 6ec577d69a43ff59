"""DeepSeek-V2 (arXiv:2405.04434): latent attention, and a mixture of experts beside shared ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import GatedMLP, LatentAttention, PreNormBlock, latent_fields, mlp_fields
from easydel.layers.moe import GroupLimitedRouter, Router
from easydel.models.experts import MoEDecoder, behind_dense_layers, expert_rules, expert_weights, shared_and_routed
from easydel.models.tasks import RoutedCausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("deepseek_v2")
class DeepseekV2Config(EasyDeLBaseConfig, transformers.DeepseekV2Config):
    """Fields of `transformers.DeepseekV2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


def make_router(config: DeepseekV2Config) -> Callable[..., Router]:
    """Return what makes the router that `topk_method` names; weights are never divided by their sum.

    Raises:
        UnsupportedError: another method.
        ValueError: experts are limited to groups, and there is no number of groups.
    """
    groups = {"groups": 1, "top_groups": 1}
    if config.topk_method == "group_limited_greedy":
        groups = {"groups": config.n_group, "top_groups": config.topk_group}
        if None in groups.values():
            raise ValueError(f"topk_method 'group_limited_greedy' needs n_group and topk_group, got {groups}")
    elif config.topk_method != "greedy":
        raise UnsupportedError(
            f"topk_method={config.topk_method!r} is not supported by DeepSeek-V2: 'greedy' or 'group_limited_greedy'"
        )

    def make(*args: Any, **options: Any) -> Router:
        options |= {"normalize": False, "scaling": config.routed_scaling_factor, **groups}
        return GroupLimitedRouter(*args, **options)

    return make


class DeepseekV2Block(PreNormBlock):
    """One layer, with experts or with an MLP."""

    def __init__(self, config: DeepseekV2Config, sparse: bool, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            LatentAttention(**latent_fields(config), **options),
            shared_and_routed(config, make_router(config), use_bias=config.mlp_bias, **options)
            if sparse
            else GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=DeepseekV2Config)
class DeepseekV2Model(MoEDecoder):
    """The DeepSeek-V2 backbone."""

    block_class = DeepseekV2Block
    layer_kinds = staticmethod(behind_dense_layers)
    weight_map = expert_weights()


@register_module(TaskType.CAUSAL_LM, config=DeepseekV2Config)
class DeepseekV2ForCausalLM(RoutedCausalLM):
    """DeepSeek-V2 with a language-model head."""

    backbone_class = DeepseekV2Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=DeepseekV2Config)
class DeepseekV2ForSequenceClassification(SequenceClassifier):
    """DeepSeek-V2 with a classification head on the last token."""

    backbone_class = DeepseekV2Model
