"""Task heads on any backbone."""

from easydel.models.tasks.base import TaskModule
from easydel.models.tasks.causal_lm import CausalLM
from easydel.models.tasks.classification import SequenceClassifier
from easydel.models.tasks.moe import MoECausalLM

__all__ = ["CausalLM", "MoECausalLM", "SequenceClassifier", "TaskModule"]
