"""GPT-OSS (arXiv:2508.10925): attention sinks, windows in every other layer, experts with biases and a cut SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from easydel.hub.transforms import IDENTITY, Interleave
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, PreNormBlock, SparseMoE, attention_fields, mlp_fields
from easydel.models.decoder import window_of
from easydel.models.experts import DOWN, GATE, UP, MoEDecoder, expert_rules
from easydel.models.tasks import DecoderTokenClassifier, MoECausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("gpt_oss")
class GptOssConfig(EasyDeLBaseConfig, transformers.GptOssConfig):
    """Fields of `transformers.GptOssConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


@dataclass(frozen=True)
class ClampedSwiGLU:
    """`(up + 1) · gate · sigmoid(alpha · gate)`, the gate cut above `limit` and up on both sides."""

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Map two arrays of a shape to one."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class GptOssBlock(PreNormBlock):
    """One layer, full or sliding."""

    def __init__(self, config: GptOssConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, window = config.attention_bias, window_of(config, layer_type)
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, window=window, sinks=True, **options),
            SparseMoE(
                **mlp_fields(config) | {"act": "silu"},  # of `ClampedSwiGLU`; `hidden_act` is not read
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                use_bias=True,
                combine=ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit),
                mechanism=config.moe_mechanism,
                **options,
            ),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


_BIASES = tuple(f"mlp/experts/{name}_bias" for name in ("gate", "up"))


@register_module(TaskType.BASE, config=GptOssConfig)
class GptOssModel(MoEDecoder):
    """The GPT-OSS backbone."""

    block_class = GptOssBlock
    # Columns of gate and up take turns; kernels are [experts, in, out], as here.
    weight_map = (
        WeightRule("mlp.experts.gate_up_proj", (GATE, UP), Interleave(2)),
        WeightRule("mlp.experts.gate_up_proj_bias", _BIASES, Interleave(1)),
        WeightRule("mlp.experts.down_proj", DOWN, IDENTITY),
        WeightRule("mlp.experts.down_proj_bias", "mlp/experts/down_bias", IDENTITY),
        WeightRule("mlp.router", "mlp/gate", None),
    )


@register_module(TaskType.CAUSAL_LM, config=GptOssConfig)
class GptOssForCausalLM(MoECausalLM):
    """GPT-OSS with a language-model head."""

    backbone_class = GptOssModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GptOssConfig)
class GptOssForSequenceClassification(SequenceClassifier):
    """GPT-OSS with a classification head on the last token."""

    backbone_class = GptOssModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=GptOssConfig)
class GptOssForTokenClassification(DecoderTokenClassifier):
    """GPT-OSS with a classification head on every token."""

    backbone_class = GptOssModel
