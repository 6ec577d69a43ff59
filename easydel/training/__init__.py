"""Training: data, a compiled step, a trainer that resumes, evaluation, logs."""

from __future__ import annotations

from easydel.training.arguments import TrainingArguments
from easydel.training.data import DataConfig, Loader, WindowedText, make_loader
from easydel.training.elarge import eLargeModel
from easydel.training.evaluate import Perplexity, evaluate, measure_perplexity
from easydel.training.rows import own_rows
from easydel.training.step import StepSettings, TrainStep
from easydel.training.trainer import Trainer, TrainingResult

__all__ = [
    "DataConfig",
    "Loader",
    "Perplexity",
    "StepSettings",
    "TrainStep",
    "Trainer",
    "TrainingArguments",
    "TrainingResult",
    "WindowedText",
    "eLargeModel",
    "evaluate",
    "make_loader",
    "measure_perplexity",
    "own_rows",
]
