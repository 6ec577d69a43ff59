"""How often XLA compiled something: the number behind "why was that call slow"."""

from __future__ import annotations

from typing import Any, Self

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counters: list[CompilationCounter] = []
_listening = False


class CompilationCounter:
    """Context manager that counts backend compilations inside its block.

    Attributes:
        count: compilations so far.
        seconds: time they took.

    Example:
        with CompilationCounter() as counter:
            model.generate(input_ids)
        print(counter.count)
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        global _listening
        if not _listening:  # jax has no way to take a single listener away: one stays, and feeds the open counters
            jax.monitoring.register_event_duration_secs_listener(_on_event)
            _listening = True
        _counters.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _counters.remove(self)


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    if event == _EVENT:
        for counter in _counters:
            counter.count += 1
            counter.seconds += duration_secs
