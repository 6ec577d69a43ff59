"""Losses: a config, pure functions in float32, and the choice by task."""

from easydel.loss.balance import load_balancing_loss, router_z_loss
from easydel.loss.chunked import chunked_cross_entropy
from easydel.loss.config import LossConfig
from easydel.loss.cross_entropy import cross_entropy
from easydel.loss.tasks import (
    causal_lm_loss,
    question_answering_loss,
    sequence_classification_loss,
    task_loss,
    token_loss,
)
from easydel.loss.uncomputed import UncomputedLogits

__all__ = [
    "LossConfig",
    "UncomputedLogits",
    "causal_lm_loss",
    "chunked_cross_entropy",
    "cross_entropy",
    "load_balancing_loss",
    "question_answering_loss",
    "router_z_loss",
    "sequence_classification_loss",
    "task_loss",
    "token_loss",
]
