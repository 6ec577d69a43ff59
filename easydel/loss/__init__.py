"""Losses: a config, pure functions in float32, and the choice by task."""

from easydel.loss.balance import load_balancing_loss
from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import cross_entropy
from easydel.loss.tasks import task_loss

__all__ = ["LossConfig", "cross_entropy", "load_balancing_loss", "task_loss"]
