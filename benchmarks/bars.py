"""Figures beside the bars they are held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A figure, and the least or the most it should be; neither: it is reported only."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the figure is where it should be."""
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        text = f"{self.what}: {self.value:.3g}{self.unit}"
        if self.least is None and self.most is None:
            return f"{text} (reported)"
        bar = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
        return f"{text} (bar {bar}{self.unit}: {'met' if self.is_met else 'MISSED'})"
