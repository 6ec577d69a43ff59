"""Meshes, partition rules, and the placement of arrays on devices."""

from easydel.sharding.activations import activation_mesh, activation_spec, constrain, current_mesh
from easydel.sharding.mesh import AXIS_NAMES, DEFAULT_AXIS_DIMS, create_mesh
from easydel.sharding.placement import FitReport, fit_spec, gather, named_shardings, place, spread_spec
from easydel.sharding.rules import PartitionRules, infer_rules, match_rules

__all__ = [
    "AXIS_NAMES",
    "DEFAULT_AXIS_DIMS",
    "FitReport",
    "PartitionRules",
    "activation_mesh",
    "activation_spec",
    "constrain",
    "create_mesh",
    "current_mesh",
    "fit_spec",
    "gather",
    "infer_rules",
    "match_rules",
    "named_shardings",
    "place",
    "spread_spec",
]
