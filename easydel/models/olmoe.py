"""OLMoE (arXiv:2409.02060): many small experts; queries and keys are normalised over all heads at once."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, PreNormBlock, RMSNorm, SparseMoE, attention_fields, mlp_fields
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights
from easydel.models.tasks import MoECausalLM
from easydel.sharding import PartitionRules


@register_config("olmoe")
class OlmoeConfig(EasyDeLBaseConfig, transformers.OlmoeConfig):
    """Fields of `transformers.OlmoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class OlmoeBlock(PreNormBlock):
    """One layer; `clip_qkv` cuts what is normalised, before it is rotated."""

    def __init__(self, config: OlmoeConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options |= dtypes
        fields, bias = attention_fields(config), config.attention_bias

        def query_norm() -> RMSNorm:
            return RMSNorm(fields["num_heads"] * fields["head_dim"], epsilon=config.rms_norm_eps, **dtypes)

        def key_norm() -> RMSNorm:
            return RMSNorm(fields["num_kv_heads"] * fields["head_dim"], epsilon=config.rms_norm_eps, **dtypes)

        super().__init__(
            Attention(
                **fields,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=(query_norm, key_norm),
                norm_per_head=False,
                clip=config.clip_qkv,
                **options,
            ),
            SparseMoE(
                **mlp_fields(config),
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                normalize=config.norm_topk_prob,
                mechanism=config.moe_mechanism,
                **options,
            ),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            **dtypes,
        )


@register_module(TaskType.BASE, config=OlmoeConfig)
class OlmoeModel(MoEDecoder):
    """The OLMoE backbone."""

    block_class = OlmoeBlock
    weight_map = expert_weights()


@register_module(TaskType.CAUSAL_LM, config=OlmoeConfig)
class OlmoeForCausalLM(MoECausalLM):
    """OLMoE with a language-model head."""

    backbone_class = OlmoeModel
