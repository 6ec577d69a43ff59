"""The run as seen in a terminal: a bar with its last numbers, or plain lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from easydel.sharding.explain_text import bytes_text
from easydel.training.logs.sinks import Record

WIDE = 110
"""Columns of a terminal that has room for a bar beside the numbers."""


class ConsoleLog:
    """Shows progress.

    Args:
        console: where to; standard error if `None`.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._total: int | None = None

    def start(self, step: int, total: int | None) -> None:
        """Show the bar, if this is a terminal."""
        self._total = total
        if self.console.is_terminal:
            bar = [BarColumn(bar_width=20)] if self.console.width >= WIDE else []
            numbers = (TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
            self._progress = Progress(TextColumn("step"), MofNCompleteColumn(), *bar, *numbers, console=self.console)
            self._task = self._progress.add_task("compiling", total=total, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, record: Record) -> None:
        """Show the numbers: in the bar, or as a line."""
        text = describe(record)
        if self._progress is None:
            total = "" if self._total is None else f"/{self._total}"
            self.console.print(f"step {record['step']}{total}  {text}", soft_wrap=True)
        elif "loss" in record:
            self._progress.update(self._task, description=text)
        else:
            self._progress.print(f"step {record['step']}  {text}")

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        (self._progress or self.console).print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(record: Record) -> str:
    """Return a record's numbers for people."""
    shown = {
        "loss": lambda v: f"loss {v:.4f}",
        "eval_loss": lambda v: f"eval loss {v:.4f}",
        "eval_perplexity": lambda v: f"perplexity {v:.2f}",
        "eval_accuracy": lambda v: f"accuracy {v:.1%}",
        "learning_rate": lambda v: f"lr {v:.2e}",
        "tokens_per_second": lambda v: f"{v:,.0f} tok/s",
        "mfu": lambda v: f"MFU {v:.1%}" if v else "",
        "memory_bytes": bytes_text,
        "skipped_steps": lambda v: f"{v} skipped" if v else "",
    }
    return "  ".join(text for name, show in shown.items() if name in record and (text := show(record[name])))
