"""ERNIE 4.5's dense models: Llama's block whose rotary positions turn neighbouring features, in float32."""

from __future__ import annotations

from typing import Any

import transformers

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("ernie4_5")
class Ernie4_5Config(EasyDeLBaseConfig, transformers.Ernie4_5Config):
    """Fields of `transformers.Ernie4_5Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Ernie4_5Block(PreNormBlock):
    """One layer; biases everywhere or nowhere."""

    def __init__(
        self, config: Ernie4_5Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias = bool(config.use_bias)
        fields = attention_fields(config) | {"dropout": 0.0}  # whatever the config says besides
        super().__init__(
            Attention(**fields, qkv_bias=bias, out_bias=bias, interleaved=True, **options),
            GatedMLP(**mlp_fields(config), use_bias=bias, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Ernie4_5Config)
class Ernie4_5Model(Decoder):
    """The ERNIE 4.5 backbone."""

    block_class = Ernie4_5Block
    wide_rotary = True


@register_module(TaskType.CAUSAL_LM, config=Ernie4_5Config)
class Ernie4_5ForCausalLM(CausalLM):
    """ERNIE 4.5 with a language-model head."""

    backbone_class = Ernie4_5Model
