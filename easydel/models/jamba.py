"""Jamba (arXiv:2403.19887): layers of Mamba and of attention, each followed by an MLP or by a mixture of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import transformers
from flax import nnx

from easydel.hub.weight_map import TRANSPOSE, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedMLP,
    LayerInputs,
    LayerOutput,
    RMSNorm,
    SelectiveMixer,
    SparseMoE,
    attention_fields,
    mlp_fields,
)
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights
from easydel.models.selective import selective_rules, selective_weights
from easydel.models.tasks import MoECausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("jamba")
class JambaConfig(EasyDeLBaseConfig, transformers.JambaConfig):
    """Fields of `transformers.JambaConfig`, and this library's runtime settings.

    `use_mamba_kernels`, `use_mambapy` and `use_associative_scan`, which choose among implementations, have no effect.
    """

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, channels, heads and widths over `tp`, the other side over `fsdp`."""
        return (*selective_rules("mamba"), *expert_rules())


class JambaBlock(nnx.Module):
    """One layer; its kind is what mixes its tokens, and whether it has experts. Nothing is rotated."""

    def __init__(
        self, config: JambaConfig, kind: tuple[str, bool], *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        mixes, is_sparse = kind
        norm = partial(RMSNorm, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = norm(config.hidden_size)
        if mixes == "attention":
            self.self_attn = Attention(**attention_fields(config), **options)
        else:
            self.mamba = SelectiveMixer(
                config.hidden_size,
                config.mamba_expand * config.hidden_size,
                state_size=config.mamba_d_state,
                step_rank=int(config.mamba_dt_rank),
                conv_kernel=config.mamba_d_conv,
                act=config.hidden_act,
                use_bias=config.mamba_proj_bias,
                use_conv_bias=config.mamba_conv_bias,
                make_norm=norm,
                init_stddev=config.initializer_range,
                **options,
            )
        self.post_attention_layernorm = norm(config.hidden_size)
        self.mlp = _experts(config, options) if is_sparse else GatedMLP(**mlp_fields(config), **options)
        self.attends = mixes == "attention"

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache, attention weights and router logits."""
        mixer = self.self_attn if self.attends else self.mamba
        out = mixer(self.input_layernorm(hidden), inputs, cache)
        hidden = hidden + out.hidden
        normed = self.post_attention_layernorm(hidden)
        mixed, router_logits = self.mlp(normed) if isinstance(self.mlp, SparseMoE) else (self.mlp(normed), None)
        return out.replace(hidden=hidden + mixed, router_logits=router_logits)


def _experts(config: JambaConfig, options: dict[str, Any]) -> SparseMoE:
    return SparseMoE(
        **mlp_fields(config),
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        normalize=False,
        mechanism=config.moe_mechanism,
        **options,
    )


@register_module(TaskType.BASE, config=JambaConfig)
class JambaModel(MoEDecoder):
    """The Jamba backbone; `position_ids` have no effect: the order of tokens is all it knows."""

    block_class = JambaBlock
    weight_map = (
        *selective_weights("mamba"),
        *expert_weights(module="feed_forward", memory="feed_forward"),
        WeightRule("feed_forward.router.weight", "mlp/gate/kernel", TRANSPOSE),
        WeightRule("feed_forward", "mlp", None),
        WeightRule("pre_ff_layernorm", "post_attention_layernorm", None),
        WeightRule("final_layernorm.weight", "norm/scale"),
    )

    @staticmethod
    def layer_kinds(config: JambaConfig) -> list[tuple[str, bool]]:
        """Return of each layer `"attention"` or `"mamba"`, and whether it has experts."""
        experts = [number > 1 for number in config.layers_num_experts]
        return list(zip(config.layers_block_type, experts, strict=True))

    def make_rotary(self) -> None:
        """Make no rotary positions."""


@register_module(TaskType.CAUSAL_LM, config=JambaConfig)
class JambaForCausalLM(MoECausalLM):
    """Jamba with a language-model head."""

    backbone_class = JambaModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=JambaConfig)
class JambaForSequenceClassification(SequenceClassifier):
    """Jamba with a classification head on the last token."""

    backbone_class = JambaModel
