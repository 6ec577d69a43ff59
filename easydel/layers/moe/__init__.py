"""Mixtures of experts: a router, stacked experts, and the ways to compute them."""

from easydel.layers.moe.experts import Experts
from easydel.layers.moe.layer import SparseMoE
from easydel.layers.moe.router import CorrectedRouter, GroupLimitedRouter, Router, Routing

__all__ = ["CorrectedRouter", "Experts", "GroupLimitedRouter", "Router", "Routing", "SparseMoE"]
