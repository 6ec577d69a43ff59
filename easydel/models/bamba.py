"""Bamba (IBM, Princeton, CMU and UIUC): Mamba-2 layers, with attention in a few places, and an MLP in every layer."""

from __future__ import annotations

from typing import Any

import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder
from easydel.models.hybrid import hybrid_rules, make_mixer
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("bamba")
class BambaConfig(EasyDeLBaseConfig, transformers.BambaConfig):
    """Fields of `transformers.BambaConfig`, and this library's runtime settings.

    `attn_layer_indices` names the layers with attention; the others are state-space layers.
    """

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return hybrid_rules()


class BambaBlock(PreNormBlock):
    """One layer, with attention or a state-space mixer."""

    def __init__(self, config: BambaConfig, kind: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, has_attention = config.attention_bias, kind == "full_attention"
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, **options)
            if has_attention
            else make_mixer(config, **options),
            GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            name="self_attn" if has_attention else "mamba",
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=BambaConfig)
class BambaModel(Decoder):
    """The Bamba backbone."""

    block_class = BambaBlock
    partial_rotary = True
    weight_map = (
        WeightRule("feed_forward", "mlp", None),
        WeightRule("pre_ff_layernorm", "post_attention_layernorm", None),
        WeightRule("layers.{i}.mamba.norm.weight", "layers/{i}/mamba/norm/scale"),
        WeightRule("final_layernorm.weight", "norm/scale"),  # after the other: it matches the end of its path, too
    )

    @staticmethod
    def layer_kinds(config: BambaConfig) -> list[str]:
        """Return which layers have attention, `"full_attention"`, and which a state, `"linear_attention"`."""
        return list(config.layers_block_type)


@register_module(TaskType.CAUSAL_LM, config=BambaConfig)
class BambaForCausalLM(CausalLM):
    """Bamba with a language-model head."""

    backbone_class = BambaModel

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if self.config.z_loss_coefficient:
            raise UnsupportedError(
                f"z_loss_coefficient={self.config.z_loss_coefficient} in the config is not supported: it would count "
                "padding, too; set it to 0 and train with LossConfig(z_loss_coefficient=…)"
            )
        super()._add_head(rngs)
