"""Falcon-H1 (arXiv:2507.22448): attention and a Mamba-2 mixer side by side in every layer, and factors throughout."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.caching import CombinedCache
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, LayerInputs, LayerOutput, RMSNorm, attention_fields, mlp_fields
from easydel.models.decoder import Decoder
from easydel.models.hybrid import hybrid_rules, make_mixer
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("falcon_h1")
class FalconH1Config(EasyDeLBaseConfig, transformers.FalconH1Config):
    """Fields of `transformers.FalconH1Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return hybrid_rules()


class FalconH1Block(nnx.Module):
    """One layer: what attention and mixer make of the same normed input is added up; then comes the MLP."""

    def __init__(self, config: FalconH1Config, kind: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del kind  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        norm = {"epsilon": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        fields, bias = attention_fields(config), config.attention_bias
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mamba = make_mixer(
            config,
            out_bias=config.projectors_bias,
            norm=config.mamba_rms_norm,
            norm_first=config.mamba_norm_before_gate,
            multipliers=config.ssm_multipliers,
            **options,
        )
        # Keys times a number, as transformers has it, are products times that number.
        scale = fields["head_dim"] ** -0.5 * config.key_multiplier
        self.self_attn = Attention(**fields, qkv_bias=bias, out_bias=bias, scale=scale, **options)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, **norm)
        gate_scale, self.mlp_out = config.mlp_multipliers
        self.mlp = GatedMLP(**mlp_fields(config), use_bias=config.mlp_bias, gate_scale=gate_scale, **options)
        self.mamba_in, self.mamba_out = config.ssm_in_multiplier, config.ssm_out_multiplier
        self.attention_in, self.attention_out = config.attention_in_multiplier, config.attention_out_multiplier

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> CombinedCache:
        """Make the mixer's and the attention's empty caches."""
        return CombinedCache(
            tuple(layer.init_cache(batch_size, max_length, dtype) for layer in (self.mamba, self.self_attn))
        )

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: CombinedCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated caches and (if asked for) attention weights."""
        normed = self.input_layernorm(hidden)
        of_mamba, of_attention = (None, None) if cache is None else cache.parts
        mixed = self.mamba(normed * self.mamba_in, inputs, of_mamba)
        attended = self.self_attn(normed * self.attention_in, inputs, of_attention)
        hidden = hidden + (mixed.hidden * self.mamba_out + attended.hidden * self.attention_out)
        hidden = hidden + self.mlp(self.pre_ff_layernorm(hidden)) * self.mlp_out
        kept = None if cache is None else CombinedCache((mixed.cache, attended.cache))
        return attended.replace(hidden=hidden, cache=kept)


@register_module(TaskType.BASE, config=FalconH1Config)
class FalconH1Model(Decoder):
    """The Falcon-H1 backbone."""

    block_class = FalconH1Block
    weight_map = (
        WeightRule("feed_forward", "mlp", None),
        WeightRule("layers.{i}.mamba.norm.weight", "layers/{i}/mamba/norm/scale"),
        WeightRule("final_layernorm.weight", "norm/scale"),  # after the other: it matches the end of its path, too
    )

    @staticmethod
    def layer_kinds(config: FalconH1Config) -> list[str]:
        """Return what each layer is: `"hybrid"`."""
        return list(config.layers_block_type)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids `[batch, seq]` to vectors `[batch, seq, hidden]`, times `embedding_multiplier`."""
        return self.embed_tokens(input_ids) * self.config.embedding_multiplier


@register_module(TaskType.CAUSAL_LM, config=FalconH1Config)
class FalconH1ForCausalLM(CausalLM):
    """Falcon-H1 with a language-model head."""

    backbone_class = FalconH1Model

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Multiply by `lm_head_multiplier`: what goes into the head rather than the logits, which are more numbers."""
        return hidden * self.config.lm_head_multiplier
