"""Signals that ask a run to end: noted, so that it can save and leave between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Within the block, SIGTERM and Ctrl-C are noted instead of ending the process; a second one does end it.

    Outside the main thread, where Python does not let signals be handled, nothing is noted. Of several processes all
    must stop at the same step: there JAX takes note of a SIGTERM to any of them, and Ctrl-C ends the process.

    Args:
        signals: others than those two.

    Attributes:
        received: the signal's name, or `None`.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
        self._signals = signals
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self, step: int) -> str:
        """Return the signal that asks the run to end now; empty if none does, or the others have not come so far.

        Args:
            step: that was done; each process asks after every one.
        """
        if jax.process_count() == 1:
            return self.received or ""
        return signal.SIGTERM.name if multihost_utils.reached_preemption_sync_point(step) else ""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.received = signal.Signals(number).name
