"""Everything wrong with a checkpoint in one error, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easydel.errors import CheckpointError

LIMIT = 60


@dataclass(frozen=True)
class Problem:
    """One line of the table: `kind` is "missing", "unexpected", "shape", "dtype" or "file"."""

    kind: str
    tensor: str
    expected: str
    found: str


def describe(dtype: object, shape: Sequence[int]) -> str:
    """Return `float32[2, 3]`."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def short(value: Any) -> str:
    """Return the `repr` of something that a file says, cut to a length that a message can bear."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _cell(text: str) -> str:
    """Return a name as it is, unless it is long or would write more than itself on a terminal."""
    return text if len(text) <= 200 and text.isprintable() else short(text)


def raise_problems(problems: Sequence[Problem], where: Path, cure: str) -> None:
    """Raise one `CheckpointError` that lists all `problems`; do nothing if there are none."""
    if not problems:
        return
    rows = [("kind", "tensor", "expected", "found")]
    rows += [(p.kind, _cell(p.tensor), _cell(p.expected), _cell(p.found)) for p in problems[:LIMIT]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    if len(problems) > LIMIT:
        lines.append(f"... and {len(problems) - LIMIT} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise CheckpointError(f"{where}: the checkpoint does not fit ({count})\n" + "\n".join(lines) + f"\n{cure}")
