"""Mamba 2 (arXiv:2405.21060): a stack of state-space layers; no attention, no positions, a cache of one size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import LayerInputs, LayerOutput, RMSNorm, StateSpaceMixer
from easydel.layers.stack import StackOutput
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("mamba2")
class Mamba2Config(EasyDeLBaseConfig, transformers.Mamba2Config):
    """Fields of `transformers.Mamba2Config`, and this library's runtime settings.

    `norm_before_gate`, which older checkpoints hold, has no effect, as in transformers: the gate always comes first.
    """

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and the convolution's channels over `tp`, the hidden size over `fsdp`."""
        return (
            (r"mixer/in_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"mixer/out_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"mixer/conv1d/kernel", PartitionSpec(None, None, "tp")),
            (r"mixer/((in_proj|conv1d)/bias|norm/scale|A_log|D|dt_bias)", PartitionSpec("tp")),
            *decoder_rules(),
        )


class Mamba2Block(nnx.Module):
    """One layer: a state-space mixer behind a norm, around a residual that may be kept in float32."""

    def __init__(self, config: Mamba2Config, kind: None, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del kind  # all layers are alike
        if not getattr(config, "rms_norm", True):
            raise UnsupportedError("rms_norm=False is not supported by Mamba2 models: their mixers end with a norm")
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm = RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, **dtypes)
        self.mixer = StateSpaceMixer(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            state_size=config.state_size,
            num_groups=config.n_groups,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            act=config.hidden_act,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            epsilon=config.layer_norm_epsilon,
            time_step_limit=config.time_step_limit,
            time_step_init=(config.time_step_min, config.time_step_max, config.time_step_floor),
            out_scale=1 / config.num_hidden_layers if config.rescale_prenorm_residual else 1.0,
            init_stddev=config.initializer_range,
            **dtypes,
            **options,
        )
        self.residual_in_fp32, self.dtype = config.residual_in_fp32, dtype

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the updated cache."""
        out = self.mixer(self.norm(hidden.astype(self.dtype)), inputs, cache)
        residual = hidden.astype(jnp.float32) if self.residual_in_fp32 else hidden
        return out.replace(hidden=residual + out.hidden)


@register_module(TaskType.BASE, config=Mamba2Config)
class Mamba2Model(Decoder):
    """The Mamba 2 backbone.

    `position_ids` have no effect, and there are no attention weights to return: the order of tokens is all it knows.
    """

    block_class = Mamba2Block
    base_model_prefix = "backbone"
    has_padding_token = False
    weight_map = (
        WeightRule("embeddings", "embed_tokens", None),
        WeightRule("layers.{i}.norm.weight", "layers/{i}/norm/scale"),
        WeightRule("layers.{i}.mixer.norm.weight", "layers/{i}/mixer/norm/scale"),
        WeightRule("norm_f.weight", "norm/scale"),  # after those above: it matches the end of their paths, too
    )

    @staticmethod
    def layer_kinds(config: Mamba2Config) -> list[None]:
        """Return what tells each layer from the others: nothing."""
        return [None] * config.num_hidden_layers

    def make_norm(self) -> RMSNorm:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.layer_norm_epsilon, **self.dtypes)

    def make_rotary(self) -> None:
        """Make no rotary positions."""

    def hidden_states(self, out: StackOutput, last: jax.Array) -> tuple[jax.Array, ...]:
        """Return each layer's output, and the last one normed: without the embeddings, as in transformers."""
        return (*out.inputs[1:], out.hidden, last)


@register_module(TaskType.CAUSAL_LM, config=Mamba2Config)
class Mamba2ForCausalLM(CausalLM):
    """Mamba 2 with a language-model head."""

    backbone_class = Mamba2Model
    base_model_prefix = "backbone"
    tied_weight = "embeddings.weight"
