"""What a log is: something that takes records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Record = dict[str, Any]
"""`step` and numbers by name; those of an evaluation begin with `eval_`."""


class Log(Protocol):
    """Takes a run's records as they come."""

    def start(self, step: int, total: int | None) -> None:
        """Begin at a step; what a run before it wrote of later ones is no longer true."""

    def advance(self, step: int) -> None:
        """A step has been done."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def say(self, text: str) -> None:
        """Take a message for people."""

    def close(self) -> None:
        """Nothing more comes."""


class Logs:
    """Several logs as one."""

    def __init__(self, logs: Sequence[Log]) -> None:
        self.logs = list(logs)

    def start(self, step: int, total: int | None) -> None:
        """Begin at a step."""
        for log in self.logs:
            log.start(step, total)

    def advance(self, step: int) -> None:
        """A step has been done."""
        for log in self.logs:
            log.advance(step)

    def write(self, record: Record) -> None:
        """Take a record."""
        for log in self.logs:
            log.write(record)

    def say(self, text: str) -> None:
        """Take a message for people."""
        for log in self.logs:
            log.say(text)

    def close(self) -> None:
        """Nothing more comes."""
        for log in self.logs:
            log.close()
