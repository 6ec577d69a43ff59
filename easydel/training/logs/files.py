"""Logs in files: JSON lines, TensorBoard events, and the curves drawn from them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from easydel.training.logs.sinks import Record


class NoDisplay:
    """The part of a log that shows nothing to people."""

    def advance(self, step: int) -> None:
        """Nothing is written for a step alone."""

    def say(self, text: str) -> None:
        """Messages are not kept."""


class JsonLog(NoDisplay):
    """One JSON object a line, each written at once.

    Args:
        file: its name; what an earlier run wrote stays, as far as it is still true.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open: Any = None

    def start(self, step: int, total: int | None) -> None:
        """Drop what was written of steps after `step`: they are done again."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(self.file) if record["step"] <= step] if step else []
        new = self.file.with_suffix(".new")
        new.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(new, self.file)
        self._open = self.file.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        """Append a line; what is not finite stands there as text, which every JSON reader takes."""
        self._open.write(_line(record))

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _line(record: Record) -> str:
    written = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
    return json.dumps(written) + "\n"


def read_log(file: Path) -> list[Record]:
    """Return the records of a log; a last line that was cut off is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    if not file.exists():
        return []
    records = []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break  # the process ended while it was written
            raise ValueError(f"{file}:{number}: not a line of a log: {error}") from error
        records.append({n: float(v) if isinstance(v, str) else v for n, v in record.items()})
    return records


class TensorBoardLog(NoDisplay):
    """TensorBoard's event files.

    Args:
        directory: of the files.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "a TensorBoard log needs tensorboardX: pip install 'easydel-base[train]', or leave 'tensorboard' out "
                "of log_to"
            ) from error
        self._writer_class, self.directory = tensorboardX.SummaryWriter, directory
        self._writer: Any = None

    def start(self, step: int, total: int | None) -> None:
        """Begin a file; TensorBoard then hides what older ones hold of later steps."""
        self._writer = self._writer_class(str(self.directory), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Add a number for each name."""
        for name, value in record.items():
            if name != "step":
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class CurvesLog(NoDisplay):
    """Draws the loss and the learning rate of a JSON log when the run ends.

    Args:
        source: the log.
        picture: a PNG file.
    """

    def __init__(self, source: Path, picture: Path) -> None:
        self.source, self.picture = source, picture

    def start(self, step: int, total: int | None) -> None:
        """Nothing to do yet."""

    def write(self, record: Record) -> None:
        """The JSON log has it."""

    def close(self) -> None:
        """Draw."""
        from easydel.training.logs.curves import draw_curves

        records = read_log(self.source)
        if records:
            draw_curves(records, self.picture)
