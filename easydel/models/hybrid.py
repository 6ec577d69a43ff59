"""What decoders share in which state-space layers stand beside or between attention layers."""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from easydel.layers import StateSpaceMixer
from easydel.models.decoder import decoder_rules
from easydel.sharding import PartitionRules


def hybrid_rules() -> PartitionRules:
    """Return `decoder_rules` and those of mixers called `mamba`: heads over `tp`, the other side over `fsdp`."""
    return (
        (r"mamba/in_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"mamba/out_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"mamba/conv1d/kernel", PartitionSpec(None, None, "tp")),
        (r"mamba/((in_proj|conv1d)/bias|norm/scale|A_log|D|dt_bias)", PartitionSpec("tp")),
        *decoder_rules(),
    )


def make_mixer(config: Any, **options: Any) -> StateSpaceMixer:
    """Make a state-space layer from the fields `mamba_…` of a config; `options` are what its family has besides."""
    return StateSpaceMixer(
        config.hidden_size,
        config.mamba_n_heads,
        config.mamba_d_head,
        state_size=config.mamba_d_state,
        num_groups=config.mamba_n_groups,
        conv_kernel=config.mamba_d_conv,
        chunk_size=config.mamba_chunk_size,
        act=config.hidden_act,
        use_bias=config.mamba_proj_bias,
        use_conv_bias=config.mamba_conv_bias,
        epsilon=config.rms_norm_eps,
        time_step_limit=config.time_step_limit,
        time_step_init=None,
        init_stddev=config.initializer_range,
        **options,
    )
