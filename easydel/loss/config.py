"""`LossConfig`: what loss to compute and how."""

from __future__ import annotations

from dataclasses import dataclass

from easydel.errors import UnsupportedError

LOSS_TYPES = ("cross_entropy",)
REDUCTIONS = ("mean", "sum")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class LossConfig:
    """How a loss is computed. Immutable and hashable: it is a static argument under `jax.jit`.

    Attributes:
        loss_type: `"cross_entropy"`.
        label_smoothing: share of the target's probability spread evenly over all classes, in `[0, 1)`.
        z_loss_coefficient: weight of the squared log-partition function (PaLM, arXiv:2204.02311, section 5).
        auxiliary_loss_coefficient: weight of a mixture-of-experts model's balancing loss; `None` follows the model.
        ignore_index: labels with this value are left out.
        reduction: `"mean"` over the labels that count, or `"sum"`.
        problem_type: of a sequence classifier; `None` follows the model's config, else the labels' type.

    Raises:
        ValueError: a value is out of its range or unknown.
    """

    loss_type: str = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss_coefficient: float = 0.0
    auxiliary_loss_coefficient: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("reduction", self.reduction, REDUCTIONS),
            ("problem_type", self.problem_type, (None, *PROBLEM_TYPES)),
        ):
            if value not in known:
                raise UnsupportedError(f"{name}={value!r} is not supported; choose one of {', '.join(map(str, known))}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.z_loss_coefficient < 0:
            raise ValueError(f"z_loss_coefficient must not be negative, got {self.z_loss_coefficient}")
