"""Mamba (arXiv:2312.00752): selective state-space layers; no attention, no positions, a cache of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import LayerInputs, LayerOutput, RMSNorm, SelectiveMixer
from easydel.layers.ssm import initial_time_steps, torch_init
from easydel.layers.stack import StackOutput
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.selective import selective_rules, selective_weights
from easydel.models.tasks import CausalLM
from easydel.sharding import PartitionRules


@register_config("mamba")
class MambaConfig(EasyDeLBaseConfig, transformers.MambaConfig):
    """Fields of `transformers.MambaConfig`, and this library's runtime settings.

    `use_mambapy` and `use_associative_scan`, which choose among implementations, have no effect.
    """

    def get_partition_rules(self) -> PartitionRules:
        """Split channels over `tp`, the hidden size over `fsdp`."""
        return (*selective_rules("mixer"), *decoder_rules())


class MambaBlock(nnx.Module):
    """One layer: a selective mixer behind a norm, around a residual that may be kept in float32."""

    def __init__(
        self,
        config: Any,
        kind: None,
        *,
        make_norm: Callable[[int], nnx.Module] | None = None,
        dtype: Any,
        param_dtype: Any,
        **options: Any,
    ) -> None:
        del kind  # all layers are alike
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm = RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, **dtypes)
        self.mixer = SelectiveMixer(
            config.hidden_size,
            config.intermediate_size,
            state_size=config.state_size,
            step_rank=int(config.time_step_rank),
            conv_kernel=config.conv_kernel,
            act=config.hidden_act,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            make_norm=make_norm,
            init_stddev=config.initializer_range,
            conv_init=torch_init(),
            step_init=_step_init(config),
            step_bias_init=_step_bias_init(config),
            out_init=torch_init(1 / config.num_hidden_layers if config.rescale_prenorm_residual else 1.0),
            **dtypes,
            **options,
        )
        self.residual_in_fp32, self.dtype = config.residual_in_fp32, dtype

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the updated cache."""
        out = self.mixer(self.norm(hidden.astype(self.dtype)), inputs, cache)
        residual = hidden.astype(jnp.float32) if self.residual_in_fp32 else hidden
        return out.replace(hidden=residual + out.hidden)


def _step_init(config: Any) -> Callable[..., jax.Array]:
    """Return the initializer of the time steps' projection (section 3.6)."""
    size = config.time_step_scale * config.time_step_rank**-0.5
    if config.time_step_init_scheme == "constant":
        return jax.nn.initializers.constant(size)
    if config.time_step_init_scheme == "random":
        return lambda key, shape, dtype: jax.random.uniform(key, shape, jnp.float32, -size, size).astype(dtype)
    raise UnsupportedError(
        f"time_step_init_scheme={config.time_step_init_scheme!r} is not supported: give 'constant' or 'random'"
    )


def _step_bias_init(config: Any) -> Callable[..., jax.Array]:
    def init(key: jax.Array, shape: tuple[int], dtype: Any) -> jax.Array:
        times = (config.time_step_min, config.time_step_max, config.time_step_floor)
        return initial_time_steps(key, shape[0], *times).astype(dtype)

    return init


@register_module(TaskType.BASE, config=MambaConfig)
class MambaModel(Decoder):
    """The Mamba backbone.

    `position_ids` have no effect, and there are no attention weights to return: the order of tokens is all it knows.
    """

    block_class = MambaBlock
    base_model_prefix = "backbone"
    has_padding_token = False
    legacy_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"(^|\.)embedding\.weight$", r"\1embeddings.weight"),  # as first published
    )
    weight_map = (
        *selective_weights("mixer"),
        WeightRule("embeddings", "embed_tokens", None),
        WeightRule("layers.{i}.norm.weight", "layers/{i}/norm/scale"),
        WeightRule("norm_f.weight", "norm/scale"),  # after the one above: it matches the end of its paths, too
    )

    @staticmethod
    def layer_kinds(config: Any) -> list[None]:
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


@register_module(TaskType.CAUSAL_LM, config=MambaConfig)
class MambaForCausalLM(CausalLM):
    """Mamba with a language-model head."""

    backbone_class = MambaModel
    base_model_prefix = "backbone"
    tied_weight = "embeddings.weight"
