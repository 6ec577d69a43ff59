"""Falcon Mamba (arXiv:2410.05355): Mamba that norms what its tokens choose of the recurrence, without weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.models.decoder import decoder_rules
from easydel.models.mamba import MambaBlock, MambaForCausalLM, MambaModel
from easydel.models.selective import selective_rules
from easydel.sharding import PartitionRules


@register_config("falcon_mamba")
class FalconMambaConfig(EasyDeLBaseConfig, transformers.FalconMambaConfig):
    """Fields of `transformers.FalconMambaConfig`, and this library's runtime settings.

    `use_mambapy` and `use_associative_scan`, which choose among implementations, have no effect.
    """

    def get_partition_rules(self) -> PartitionRules:
        """Split channels over `tp`, the hidden size over `fsdp`."""
        return (*selective_rules("mixer"), *decoder_rules())


class UnscaledRMSNorm(nnx.Module):
    """`x / rms(x)` over the last axis, in float32."""

    def __init__(self, *, epsilon: float, dtype: Any) -> None:
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., features]`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)


class FalconMambaBlock(MambaBlock):
    """One layer of Mamba, with norms of time steps and of what tokens write and read."""

    def __init__(self, config: FalconMambaConfig, kind: None, *, dtype: Any, **options: Any) -> None:
        def make_norm(features: int) -> UnscaledRMSNorm:
            del features  # of any number
            return UnscaledRMSNorm(epsilon=config.mixer_rms_eps, dtype=dtype)

        super().__init__(config, kind, make_norm=make_norm, dtype=dtype, **options)


@register_module(TaskType.BASE, config=FalconMambaConfig)
class FalconMambaModel(MambaModel):
    """The Falcon Mamba backbone; see `MambaModel`."""

    block_class = FalconMambaBlock
    legacy_names = ()


@register_module(TaskType.CAUSAL_LM, config=FalconMambaConfig)
class FalconMambaForCausalLM(MambaForCausalLM):
    """Falcon Mamba with a language-model head."""

    backbone_class = FalconMambaModel
