"""Rows out of windows: which share one, and what a row looks like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from easydel.training.data.batch import IGNORED, Batch
from easydel.training.data.documents import Window

Place = tuple[int, int]


class Placed(NamedTuple):
    """A window and where it can be had again: the number of its record in the order of reading, and its own there."""

    place: Place
    window: Window


Row = list[Placed]


class Packer:
    """Puts windows into rows of a fixed length, whole and in the order they come.

    A window goes into the fullest open row in which it fits. If it fits in none and there are no more rows to open, the
    oldest is closed: so no window waits for long. A row that is full is closed at once.

    Args:
        length: of a row in tokens.
        open_rows: how many rows may be open; 0: each window has its own.
    """

    def __init__(self, length: int, open_rows: int) -> None:
        self.length, self.open_rows = length, open_rows
        self.rows: list[Row] = []

    def add(self, placed: Placed) -> list[Row]:
        """Place a window; return the rows that are closed by that."""
        if not self.open_rows:
            return [[placed]]
        size = len(placed.window.ids)
        fitting = [row for row in self.rows if _used(row) + size <= self.length]
        closed = []
        if fitting:
            row = max(fitting, key=_used)
        else:
            if len(self.rows) == self.open_rows:
                closed.append(self.rows.pop(0))
            row = []
            self.rows.append(row)
        row.append(placed)
        if self.length - _used(row) < 2:  # no window is shorter than two tokens
            self.rows = [other for other in self.rows if other is not row]
            closed.append(row)
        return closed

    def flush(self) -> list[Row]:
        """Close all rows."""
        closed, self.rows = self.rows, []
        return closed


def _used(row: Row) -> int:
    return sum(len(placed.window.ids) for placed in row)


def fill_batch(rows: Sequence[Iterable[Window]], length: int, pad_id: int, *, packed: bool) -> Batch:
    """Make the arrays of a batch, int32 `[len(rows), length]`.

    Returns:
        `input_ids` (`pad_id` behind the windows), `labels` (-100 there), `attention_mask` (1 for tokens) and, if
        packed, `segment_ids` (1, 2, … for the windows of a row, 0 for padding) and `position_ids` (from 0 in each).
    """
    names = ("input_ids", "labels", "attention_mask") + (("segment_ids", "position_ids") if packed else ())
    batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
    batch["input_ids"][:] = pad_id
    batch["labels"][:] = IGNORED
    for number, row in enumerate(rows):
        start = 0
        for segment, window in enumerate(row, 1):
            place = (number, slice(start, start := start + len(window.ids)))
            batch["input_ids"][place], batch["labels"][place] = window.ids, window.labels
            batch["attention_mask"][place] = 1
            if packed:
                batch["segment_ids"][place] = segment
                batch["position_ids"][place] = np.arange(len(window.ids))
    return batch


@dataclass(frozen=True)
class Statistics:
    """What has been read and made so far, over all processes.

    Attributes:
        documents: read; a document is counted again in each pass.
        skipped_documents: of them, those of which no label was left after they were cut.
        dropped_tokens: tokens of documents that came into no row.
        rows: made.
        tokens: in them, padding not counted.
        labels: tokens in them that are learned.
        padding: places in them that hold no token.
    """

    documents: int = 0
    skipped_documents: int = 0
    dropped_tokens: int = 0
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    padding: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def padding_share(self) -> float:
        """Share of all places that hold no token, in [0, 1]."""
        return self.padding / max(self.tokens + self.padding, 1)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents ({self.skipped_documents:,} skipped, {self.dropped_tokens:,} tokens "
            f"dropped); {self.tokens:,} tokens in {self.rows:,} rows, {self.labels:,} of them learned, "
            f"{self.padding_share:.1%} padding"
        )


def count_rows(rows: Sequence[Sequence[Window]], length: int) -> Statistics:
    """Return what some rows add to the statistics."""
    windows = [window for row in rows for window in row]
    tokens = sum(len(window.ids) for window in windows)
    labels = sum(int((window.labels != IGNORED).sum()) for window in windows)
    return Statistics(rows=len(rows), tokens=tokens, labels=labels, padding=len(rows) * length - tokens)
