"""GLM-4.5 (arXiv:2508.06471): grouped-query attention that rotates part of a head, and DeepSeek-V3's experts."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, RMSNorm, attention_fields, mlp_fields
from easydel.models.experts import (
    MoEDecoder,
    behind_dense_layers,
    corrected_router,
    expert_rules,
    expert_weights,
    shared_and_routed,
)
from easydel.models.tasks import RoutedCausalLM
from easydel.sharding import PartitionRules


@register_config("glm4_moe")
class Glm4MoeConfig(EasyDeLBaseConfig, transformers.Glm4MoeConfig):
    """Fields of `transformers.Glm4MoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class Glm4MoeBlock(PreNormBlock):
    """One layer, with experts or with an MLP."""

    def __init__(self, config: Glm4MoeConfig, sparse: bool, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields = attention_fields(config)

        def head_norm() -> RMSNorm:
            return RMSNorm(fields["head_dim"], epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        qk_norm = head_norm if config.use_qk_norm else None
        super().__init__(
            Attention(**fields, qkv_bias=config.attention_bias, qk_norm=qk_norm, **options),
            shared_and_routed(config, corrected_router(config), use_bias=False, **options)
            if sparse
            else GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Glm4MoeConfig)
class Glm4MoeModel(MoEDecoder):
    """The GLM-4.5 backbone."""

    block_class = Glm4MoeBlock
    layer_kinds = staticmethod(behind_dense_layers)
    weight_map = expert_weights()
    partial_rotary: ClassVar[bool] = True
    # Behind the last of 46 or 92 layers, files hold a module that predicts one more token.
    harmless_extras: ClassVar[tuple[str, ...]] = (*MoEDecoder.harmless_extras, r"(^|\.)layers\.(46|92)\.")


@register_module(TaskType.CAUSAL_LM, config=Glm4MoeConfig)
class Glm4MoeForCausalLM(RoutedCausalLM):
    """GLM-4.5 with a language-model head."""

    backbone_class = Glm4MoeModel
