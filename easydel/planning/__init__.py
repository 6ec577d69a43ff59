"""What a training step will take on a mesh that need not exist here."""

from easydel.planning.plan import Plan
from easydel.planning.planner import plan_training


__all__ = ["Plan", "plan_training"]
