"""Losses: a config, pure functions in float32, and the choice by task."""

from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import cross_entropy
from easydel.loss.tasks import task_loss

__all__ = ["LossConfig", "cross_entropy", "task_loss"]
