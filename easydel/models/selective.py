"""What families with Mamba's selective state-space layers share."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from easydel.hub.weight_map import TRANSPOSE, Split, WeightRule
from easydel.sharding import PartitionRules


def selective_weights(module: str) -> tuple[WeightRule, ...]:
    """Return the rules of `SelectiveMixer`s of this name; files hold what is mixed and its gate as one."""
    kernels, biases = ([f"{module}/{name}_proj/{leaf}" for name in ("in", "gate")] for leaf in ("kernel", "bias"))
    return (
        WeightRule(f"{module}.in_proj.weight", tuple(kernels), Split(0, TRANSPOSE)),
        WeightRule(f"{module}.in_proj.bias", tuple(biases), Split(0)),
        WeightRule(f"{module}.dt_proj.bias", f"{module}/dt_bias"),
    )


def selective_rules(module: str) -> PartitionRules:
    """Return the partition rules of `SelectiveMixer`s of this name: channels over `tp`, the other side over `fsdp`."""
    return (
        (rf"{module}/(in|gate|dt)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (rf"{module}/(x|out)_proj/kernel", PartitionSpec("tp", "fsdp")),
        (rf"{module}/conv1d/kernel", PartitionSpec(None, None, "tp")),
        (rf"{module}/A_log", PartitionSpec("tp", None)),
        (rf"{module}/((in_proj|gate_proj|conv1d)/bias|D|dt_bias)", PartitionSpec("tp")),
    )
