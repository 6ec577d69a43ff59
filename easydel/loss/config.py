"""`LossConfig`: what loss to compute and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp

from easydel.errors import UnsupportedError
from easydel.fields import read_fields

LOSS_TYPES = ("cross_entropy",)
REDUCTIONS = ("mean", "sum", "none")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class LossConfig:
    """How a loss is computed. Immutable and hashable: it is a static argument under `jax.jit`.

    A field with another value than its default that does not apply to a task raises when that task's loss is computed.

    Attributes:
        loss_type: `"cross_entropy"`, for everything that chooses among classes; what a sequence classifier does
            otherwise is its `problem_type`.
        label_smoothing: share of the target's probability spread evenly over all classes, in `[0, 1)`.
        z_loss_coefficient: weight of the squared log-partition function (PaLM, arXiv:2204.02311, section 5).
        auxiliary_loss_coefficient: weight of a mixture of experts' balancing loss; `None` follows the model. A model
            without experts has no such loss, whatever is said here.
        router_z_loss_coefficient: weight of a mixture of experts' router z-loss (ST-MoE, arXiv:2202.08906, equation 5).
        ignore_index: labels with this value are left out.
        reduction: `"mean"` over the labels that count; `"sum"`; or `"none"`, one loss for each label, 0 where it does
            not count.
        loss_normalizing_factor: a positive number by which the sum is divided in place of the count of labels that
            count, as if there were so many. Losses of micro-batches then add up. Of `reduction="mean"` only.
        num_labels: how many classes a classifier's logits must have.
        problem_type: of a sequence classifier; `None` follows the model's config, else the labels' type.
        shift_tokens: whether a language model's logits are compared with the *next* label; `None`: as the task does
            (causal models shift, others do not).
        token_chunk_size: of how many tokens, on each device, a language model's logits exist at once; the loss is then
            computed from the head, `.logits` is `None`, and no `[batch, seq, vocab]` is ever made. `"auto"` chooses
            by the vocabulary's size. `None`: all at once.
        compute_dtype: dtype of the loss's arithmetic; sums over tokens are float32 at least, and the result is float32.

    Raises:
        ValueError: a value is out of its range or unknown, or two contradict each other.
    """

    loss_type: str = "cross_entropy"
    label_smoothing: float = 0.0
    z_loss_coefficient: float = 0.0
    auxiliary_loss_coefficient: float | None = None
    router_z_loss_coefficient: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    loss_normalizing_factor: float | None = None
    num_labels: int | None = None
    problem_type: str | None = None
    shift_tokens: bool | None = None
    token_chunk_size: int | str | None = None
    compute_dtype: Any = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_dtype", _dtype_name(self.compute_dtype))
        for name, value, known in (
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("reduction", self.reduction, REDUCTIONS),
            ("problem_type", self.problem_type, (None, *PROBLEM_TYPES)),
            ("compute_dtype", self.compute_dtype, COMPUTE_DTYPES),
        ):
            if value not in known:
                raise UnsupportedError(f"{name}={value!r} is not supported; choose one of {', '.join(map(str, known))}")
        self._check_numbers()
        if self.shift_tokens is not None and not isinstance(self.shift_tokens, bool):
            raise ValueError(f"shift_tokens must be True, False or None, got {self.shift_tokens!r}")
        if self.loss_normalizing_factor is not None and self.reduction != "mean":
            raise ValueError(
                f"loss_normalizing_factor={self.loss_normalizing_factor} replaces the divisor of reduction='mean', but "
                f"reduction={self.reduction!r} does not divide: leave one of them out"
            )
        if self.token_chunk_size is not None and self.reduction == "none":
            raise UnsupportedError(
                f"reduction='none' with token_chunk_size={self.token_chunk_size!r} is not supported: chunks are summed "
                "as they are made; leave one of them out"
            )

    def _check_numbers(self) -> None:
        if not (_is_number(self.label_smoothing) and 0.0 <= self.label_smoothing < 1.0):
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        for name in ("z_loss_coefficient", "auxiliary_loss_coefficient", "router_z_loss_coefficient"):
            value = getattr(self, name)
            if name == "auxiliary_loss_coefficient" and value is None:
                continue
            if not _is_number(value) or value < 0:
                raise ValueError(f"{name} must not be negative but a finite number, got {value!r}")
        if not _is_integer(self.ignore_index):
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        factor = self.loss_normalizing_factor
        if factor is not None and not (_is_number(factor) and factor > 0):
            raise ValueError(f"loss_normalizing_factor must be a positive number, got {factor!r}")
        if self.num_labels is not None and not (_is_integer(self.num_labels) and self.num_labels > 0):
            raise ValueError(f"num_labels must be a positive integer, got {self.num_labels!r}")
        size = self.token_chunk_size
        if size not in (None, "auto") and not (_is_integer(size) and size > 0):  # type: ignore[operator]
            raise ValueError(f"token_chunk_size must be a positive number of tokens, 'auto' or None, got {size!r}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make a config of a mapping, such as a file holds.

        Raises:
            ValueError: a name that is no field (the nearest one is named), or a value of the wrong type. Else as the
                constructor.
        """
        return cls(**read_fields(cls, fields))


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)  # refused with the unknown ones


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
