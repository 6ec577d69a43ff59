"""Meshes, partition rules, and the placement of arrays on devices."""

from easydel.sharding.activations import (
    activation_mesh,
    activation_spec,
    at_use,
    constrain,
    current_mesh,
    is_gathering,
    is_on_one_device,
    sequence_is_split,
)
from easydel.sharding.creation import create_arrays
from easydel.sharding.explain import ShardingExplanation, explain_rules
from easydel.sharding.mesh import (
    AXIS_NAMES,
    DEFAULT_AXIS_DIMS,
    AnyMesh,
    abstract_mesh,
    as_mesh,
    check_mesh,
    create_mesh,
    parse_mesh,
)
from easydel.sharding.placement import (
    DroppedAxis,
    FitReport,
    fit_spec,
    gather,
    named_shardings,
    place,
    rule_shardings,
    spread_spec,
)
from easydel.sharding.rules import PartitionRules, find_matches, infer_rules, match_rules

__all__ = [
    "AXIS_NAMES",
    "DEFAULT_AXIS_DIMS",
    "AnyMesh",
    "DroppedAxis",
    "FitReport",
    "PartitionRules",
    "ShardingExplanation",
    "abstract_mesh",
    "activation_mesh",
    "activation_spec",
    "as_mesh",
    "at_use",
    "check_mesh",
    "constrain",
    "create_arrays",
    "create_mesh",
    "current_mesh",
    "explain_rules",
    "find_matches",
    "fit_spec",
    "gather",
    "infer_rules",
    "is_gathering",
    "is_on_one_device",
    "match_rules",
    "named_shardings",
    "parse_mesh",
    "place",
    "rule_shardings",
    "sequence_is_split",
    "spread_spec",
]
