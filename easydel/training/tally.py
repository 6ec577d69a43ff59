"""What the steps of a run tell, taken in a step late so that the host never waits for the one just begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import jax

from easydel.training.logs import Record
from easydel.training.progress import Means, Progress
from easydel.training.throughput import Meter

LAG = 1
"""Steps that may be under way while the host prepares the next one."""


class Tally:
    """Keeps a run's counts.

    Args:
        say: where to report a step that was skipped.

    Attributes:
        progress: where the run stands; what steps under way will tell is not in it yet.
        meter: of tokens and time.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.progress, self.meter = Progress(), Meter(0.0)
        self._say, self._means = say, Means()
        self._under_way: deque[tuple[int, Mapping[str, jax.Array]]] = deque()
        self._is_compiled, self._since = False, False

    def push(self, tokens: int, metrics: Mapping[str, jax.Array]) -> None:
        """Note a step that has been begun; take in those before it."""
        self._under_way.append((tokens, metrics))
        self.progress.iteration += 1
        while len(self._under_way) > LAG:
            self._take(*self._under_way.popleft())

    def drain(self) -> None:
        """Wait for all steps and take them in."""
        while self._under_way:
            self._take(*self._under_way.popleft())

    def _take(self, tokens: int, metrics: Mapping[str, jax.Array]) -> None:
        told = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite, self._since = bool(told["is_finite"]), True
        self.progress.note_step(finite)
        self.progress.tokens += tokens
        if self._is_compiled:
            self.meter.add(tokens)
        else:  # the first step's time is the compiler's
            self._is_compiled = True
            self.meter.restart()
        if finite:
            self._means.add(told)
            return
        self._say(
            f"step skipped: loss {told['loss']}, norm of the gradient {told['grad_norm']} "
            f"({self.progress.skipped_in_a_row} in a row, {self.progress.skipped} in all)"
        )

    @property
    def has_news(self) -> bool:
        """Whether there were steps since the last record."""
        return self._since

    def record(self) -> Record:
        """Return the means since the last record, and the counts."""
        progress, self._since = self.progress, False
        record: Record = {"step": progress.iteration} | self._means.take() | self.meter.read()
        return record | {"tokens": progress.tokens, "skipped_steps": progress.skipped, "seconds": progress.seconds}
