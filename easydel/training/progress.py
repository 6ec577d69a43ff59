"""Where a run stands, and the means of what its last steps told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from easydel.training.logs import Record


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint.

    Attributes:
        iteration: batches seen.
        skipped: of these, how many changed nothing, because loss or gradient were not finite.
        skipped_in_a_row: of the last ones.
        tokens: seen, without padding.
        seconds: spent, over all parts of the run.
        best: the best value of the metric so far.
        evaluations_without_better: since then.
    """

    iteration: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    evaluations_without_better: int = 0

    @property
    def updates(self) -> int:
        """How often the parameters have been changed."""
        return self.iteration - self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def note_step(self, finite: bool) -> None:
        """Count a step."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def note_metric(self, value: float, *, lowest: bool, threshold: float) -> bool:
        """Take down a metric; return whether it is the best so far."""
        gain = None if self.best is None else (self.best - value if lowest else value - self.best)
        if value == value and (gain is None or gain > threshold):
            self.best, self.evaluations_without_better = value, 0
            return True
        self.evaluations_without_better += 1
        return False


class Means:
    """Means over steps: weighted by tokens for what is a mean over tokens, plain for the gradient's norm.

    Of the learning rate the last value stands.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in what a step told."""
        tokens = metrics.get("num_tokens", 1)
        for name, value in metrics.items():
            if name in ("num_tokens", "is_finite"):
                continue
            if name == "learning_rate":
                self._sums[name], self._weights[name] = value, 1.0
                continue
            weight = 1.0 if name == "grad_norm" else tokens
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def take(self) -> Record:
        """Return the means, and begin anew."""
        means = {name: total / max(self._weights[name], 1e-12) for name, total in self._sums.items()}
        self._sums, self._weights = {}, {}
        return means
