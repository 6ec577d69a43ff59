"""Granite MoE (IBM Granite 3): a mixture of experts in a decoder whose embeddings, layers and logits are scaled."""

from __future__ import annotations

from typing import Any

import jax
import transformers

from easydel.hub.weight_map import TRANSPOSE, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, PreNormBlock, SparseMoE, attention_fields, mlp_fields
from easydel.models.experts import MoEDecoder, expert_rules, fused_experts
from easydel.models.tasks import MoECausalLM
from easydel.sharding import PartitionRules


@register_config("granitemoe")
class GraniteMoeConfig(EasyDeLBaseConfig, transformers.GraniteMoeConfig):
    """Fields of `transformers.GraniteMoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class GraniteMoeBlock(PreNormBlock):
    """One layer; what it adds is scaled, and so are attention's products."""

    def __init__(
        self, config: GraniteMoeConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, scale = config.attention_bias, config.attention_multiplier
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, scale=scale, **options),
            SparseMoE(
                **mlp_fields(config),
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                mechanism=config.moe_mechanism,
                **options,
            ),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            residual_scale=config.residual_multiplier,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=GraniteMoeConfig)
class GraniteMoeModel(MoEDecoder):
    """The Granite MoE backbone."""

    block_class = GraniteMoeBlock
    # Files and transformers' model in memory have the same tensors under other names.
    weight_map = (
        *fused_experts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight", form="file"),
        WeightRule("block_sparse_moe.router.layer.weight", "mlp/gate/kernel", TRANSPOSE, form="file"),
        *fused_experts("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj", form="memory"),
        WeightRule("block_sparse_moe.router.weight", "mlp/gate/kernel", TRANSPOSE, form="memory"),
    )

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Scale the embeddings, those that are given, too."""
        del positions
        return hidden * self.config.embedding_multiplier


@register_module(TaskType.CAUSAL_LM, config=GraniteMoeConfig)
class GraniteMoeForCausalLM(MoECausalLM):
    """Granite MoE with a language-model head, whose logits are divided by `logits_scaling`."""

    backbone_class = GraniteMoeModel

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Divide before the product, which comes to the same."""
        return hidden / self.config.logits_scaling
