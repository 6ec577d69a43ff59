"""What a training step will take on a mesh that need not exist here."""

from easydel.planning.plan import Plan
from easydel.planning.planner import plan_training
from easydel.planning.suggest import Suggestion, suggest_mesh

__all__ = ["Plan", "Suggestion", "plan_training", "suggest_mesh"]
