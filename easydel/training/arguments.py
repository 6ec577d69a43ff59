"""`TrainingArguments`: how a run is done, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from easydel.errors import UnsupportedError
from easydel.fields import read_fields
from easydel.loss import LossConfig
from easydel.training.logs.choose import LOGS
from easydel.training.optimizers import OPTIMIZERS, SCHEDULES

_APPLIES_TO = {
    "weight_decay": ("optimizer", ("adamw", "lion", "adafactor")),
    "adam_beta1": ("optimizer", ("adamw", "adam", "lion")),
    "adam_beta2": ("optimizer", ("adamw", "adam", "lion")),
    "adam_epsilon": ("optimizer", ("adamw", "adam")),
    "momentum": ("optimizer", ("sgd",)),
    "decay_ratio": ("schedule", ("wsd",)),
    "min_learning_rate_ratio": ("schedule", ("linear", "cosine", "wsd")),
}
"""What has an effect with some optimizers or schedules only; with another, a value is refused."""


@dataclass(frozen=True)
class TrainingArguments:
    """How a model is trained.

    Attributes:
        output_dir: folder of checkpoints, logs and the finished model.
        max_steps: how many batches; `None`: as many as the data has.
        num_train_epochs: passes over the data that a `DataConfig` names, if `max_steps` is `None`; else as many as are
            needed, unless the `DataConfig` has `epochs` of its own.
        batch_size: rows of a batch, over all devices and micro-batches.
        eval_batch_size: likewise, of evaluation; `None`: as `batch_size`.
        gradient_accumulation_steps: micro-batches that a batch is split into, one after the other.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"lion"` or `"adafactor"`.
        learning_rate: its highest value.
        weight_decay: of matrices, times the learning rate; norms and biases do not decay.
        adam_beta1: of Adam and its kin, as the next two.
        adam_beta2: for lion, 0.99 is usual.
        adam_epsilon: of Adam.
        momentum: of sgd.
        max_grad_norm: gradients whose global norm is larger are scaled down to it; `None`: never.
        schedule: of the learning rate, `"linear"`, `"cosine"`, `"constant"` or `"wsd"` (warmup, stable, decay).
        warmup_steps: over which the learning rate rises.
        warmup_ratio: the same, as a share of the run.
        decay_ratio: share of the run after the warmup in which `"wsd"` falls.
        min_learning_rate_ratio: what it falls to, as a share of its height.
        loss_config: of the loss; `None`: the task's own.
        trainable: regular expressions on parameter paths; what none is found in is frozen.
        frozen: regular expressions on parameter paths; what one is found in is frozen.
        seed: of dropout.
        log_steps: between two lines of the log, which hold means over these steps.
        eval_steps: between two evaluations; `None`: only at the end (if there is evaluation data).
        save_steps: between two checkpoints; `None`: only at the end, and when the run is stopped.
        save_total_limit: how many of the latest checkpoints are kept; `None`: all.
        best_metric: the checkpoint where this was best is kept, too, and the run may stop early by it.
        lowest_is_best: whether it should be low.
        early_stopping_patience: stop after so many evaluations in a row without a better `best_metric`.
        early_stopping_threshold: how much better it must be to count.
        load_best_model_at_end: end with the best checkpoint's parameters instead of the last ones.
        max_skipped_steps: stop when so many steps in a row have no finite loss and gradient.
        resume: go on from the latest checkpoint in `output_dir`, if there is one.
        save_model: write the finished model to `output_dir/model`.
        log_to: where the log goes, of `"console"`, `"jsonl"`, `"tensorboard"` and `"png"`; `None`: everywhere, except
            where a package is missing.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
        UnsupportedError: a name that is not offered.
    """

    output_dir: str
    max_steps: int | None = None
    num_train_epochs: int = 1
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    momentum: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_ratio: float = 0.2
    min_learning_rate_ratio: float = 0.0
    loss_config: LossConfig | None = None
    trainable: str | Sequence[str] | None = None
    frozen: str | Sequence[str] | None = None
    seed: int = 0
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 3
    best_metric: str = "eval_loss"
    lowest_is_best: bool = True
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    load_best_model_at_end: bool = False
    max_skipped_steps: int = 10
    resume: bool = True
    save_model: bool = True
    log_to: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before a model is loaded."""
        for name, value in read_fields(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if not self.output_dir:
            raise ValueError("output_dir must name a folder")
        positive = (
            "num_train_epochs", "batch_size", "gradient_accumulation_steps", "log_steps", "max_skipped_steps",
            "max_steps", "eval_batch_size", "eval_steps", "save_steps", "save_total_limit", "early_stopping_patience",
            "max_grad_norm", "adam_epsilon",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "momentum", "early_stopping_threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("decay_ratio", "min_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        self._check_names()
        self._check_together()

    def _check_names(self) -> None:
        checks = [("optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)]
        for name, value, known in (*checks, *(("log_to", entry, LOGS) for entry in self.log_to or ())):
            if value not in known:
                raise UnsupportedError(f"{name}={value!r} is not supported; choose one of {', '.join(known)}")

    def _check_together(self) -> None:
        for name, (setting, offered) in _APPLIES_TO.items():
            chosen, value = getattr(self, setting), getattr(self, name)
            if chosen not in offered and value != defaults(type(self))[name]:
                raise ValueError(
                    f"{name}={value} has no effect with {setting}={chosen!r}, only with {', '.join(offered)}; "
                    "leave it out"
                )
        if self.max_steps is not None and self.num_train_epochs != 1:
            raise ValueError(
                f"give max_steps={self.max_steps} or num_train_epochs={self.num_train_epochs}, not both: "
                "each says where the run ends"
            )
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience counts evaluations: set eval_steps, too")
        if self.loss_config is not None and self.loss_config.reduction == "none":
            raise ValueError("a model is trained on one number: loss_config must have reduction 'mean' or 'sum'")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split into "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} equal micro-batches"
            )
        if self.trainable is not None and self.frozen is not None:
            raise ValueError("give trainable or frozen patterns, not both: each says what the other leaves")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make arguments of a mapping, such as one read from YAML; `loss_config` may be a mapping, too.

        Raises:
            ValueError: a name that is no field (the nearest one is named), or a value of the wrong type.
        """
        if "output_dir" not in values:
            raise ValueError(f"{cls.__name__} needs output_dir, a folder for checkpoints, logs and the finished model")
        return cls(**read_fields(cls, values))


def defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields."""
    return {field.name: field.default for field in fields(cls)}
