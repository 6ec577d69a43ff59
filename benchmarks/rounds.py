"""Measuring in interleaved rounds, so that whatever else the machine does falls on everybody alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PAUSE = 0.1  # seconds between two measurements: the threads of the last one fall asleep


@dataclass
class Result:
    """Measurements of one quantity: `values` by contestant, one number a round."""

    title: str
    unit: str
    higher_is_better: bool = True
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return a contestant's median."""
        return statistics.median(self.values[name])

    def ratio(self, name: str, other: str) -> float:
        """Return one median over another."""
        return self.median(name) / self.median(other)

    def paired_ratio(self, name: str, other: str) -> float:
        """Return the median of the rounds' own ratios, which slow drifts of the machine do not touch."""
        pairs = zip(self.values[name], self.values[other], strict=True)
        return statistics.median(one / two for one, two in pairs)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(tasks: dict[str, Callable[[], float]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Run each task once a round, after `warmups` rounds that do not count; each round begins with another task."""
    names = list(tasks)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmups, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(PAUSE)
            value = tasks[name]()
            if number >= 0:
                values[name].append(value)
    return values
