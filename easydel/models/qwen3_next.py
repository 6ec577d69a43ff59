"""Qwen3-Next (Qwen team, 2025): gated delta networks with gated attention in every fourth layer, and experts."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from jax.sharding import PartitionSpec

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    GatedDeltaNet,
    GatedMLP,
    PreNormBlock,
    RMSNorm,
    attention_fields,
    mlp_fields,
)
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights, sparse_layers
from easydel.models.qwen2_moe import Qwen2MoeMLP
from easydel.models.tasks import DecoderTokenClassifier, MoECausalLM, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules

KINDS = ("linear_attention", "full_attention")


@register_config("qwen3_next")
class Qwen3NextConfig(EasyDeLBaseConfig, transformers.Qwen3NextConfig):
    """Fields of `transformers.Qwen3NextConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return (
            (r"linear_attn/in_proj_(qkvz|ba)/kernel", PartitionSpec("fsdp", "tp")),
            (r"linear_attn/out_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"linear_attn/(A_log|dt_bias)", PartitionSpec("tp")),
            (r"linear_attn/conv1d/kernel", PartitionSpec()),  # its channels stand in another order than heads
            *expert_rules(),
        )


class Qwen3NextBlock(PreNormBlock):
    """One layer; its kind is what mixes its tokens, and whether it has experts. Norms are stored less one."""

    def __init__(
        self, config: Qwen3NextConfig, kind: tuple[str, bool], *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options |= dtypes
        layer_type, is_sparse = kind
        norm = functools.partial(RMSNorm, offset=1.0)
        super().__init__(
            (_attention if layer_type == "full_attention" else _delta_net)(config, **options),
            Qwen2MoeMLP(config, **options) if is_sparse else GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            norm=norm,
            name="self_attn" if layer_type == "full_attention" else "linear_attn",
            **dtypes,
        )


def _attention(config: Qwen3NextConfig, *, dtype: Any, param_dtype: Any, **options: Any) -> Attention:
    fields, bias = attention_fields(config), config.attention_bias
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}

    def head_norm() -> RMSNorm:
        return RMSNorm(fields["head_dim"], epsilon=config.rms_norm_eps, offset=1.0, **dtypes)

    return Attention(**fields, qkv_bias=bias, out_bias=bias, qk_norm=head_norm, gated=True, **dtypes, **options)


def _delta_net(config: Qwen3NextConfig, **options: Any) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_value_heads,
        config.linear_num_key_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        conv_kernel=config.linear_conv_kernel_dim,
        act=config.hidden_act,
        epsilon=config.rms_norm_eps,
        init_stddev=config.initializer_range,
        **options,
    )


@register_module(TaskType.BASE, config=Qwen3NextConfig)
class Qwen3NextModel(MoEDecoder):
    """The Qwen3-Next backbone; the layers that predict further tokens (`mtp`), which some files hold, are left out."""

    block_class = Qwen3NextBlock
    partial_rotary = True
    weight_map = expert_weights()
    harmless_extras = (*MoEDecoder.harmless_extras, r"^mtp\.")

    @staticmethod
    def layer_kinds(config: Qwen3NextConfig) -> list[tuple[str, bool]]:
        """Return what mixes each layer's tokens, and whether it has experts."""
        if unknown := sorted(set(config.layer_types) - set(KINDS)):
            raise UnsupportedError(f"layer_types {unknown} are not supported by Qwen3-Next models, only {KINDS}")
        return list(zip(config.layer_types, sparse_layers(config), strict=True))

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, offset=1.0, **self.dtypes)


@register_module(TaskType.CAUSAL_LM, config=Qwen3NextConfig)
class Qwen3NextForCausalLM(MoECausalLM):
    """Qwen3-Next with a language-model head."""

    backbone_class = Qwen3NextModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Qwen3NextConfig)
class Qwen3NextForSequenceClassification(SequenceClassifier):
    """Qwen3-Next with a classification head on the last token."""

    backbone_class = Qwen3NextModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Qwen3NextConfig)
class Qwen3NextForTokenClassification(DecoderTokenClassifier):
    """Qwen3-Next with a classification head on every token."""

    backbone_class = Qwen3NextModel


@register_module(TaskType.QUESTION_ANSWERING, config=Qwen3NextConfig)
class Qwen3NextForQuestionAnswering(QuestionAnswering):
    """Qwen3-Next that marks the answer to a question."""

    backbone_class = Qwen3NextModel
    base_model_prefix = "transformer"
