"""Results as tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rounds import Result

OURS = "easydel"
PACKAGES = ("jax", "flax", "optax", "numpy", "safetensors", "transformers", "torch")


def environment() -> dict[str, Any]:
    """Return versions and the machine."""
    import easydel

    versions = {"easydel": easydel.__version__} | {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: version for name, version in versions.items() if version},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def number(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def summary(result: Result) -> str:
    """Return a quantity's medians in one line."""
    return f"{result.title}, {result.unit}: " + ", ".join(f"{n} {number(result.median(n))}" for n in result.values)


def rows(results: Sequence[Result], columns: Sequence[str], others: Sequence[str]) -> list[list[str]]:
    """Return the table: the header, then a row per quantity with medians (and ranges) and our ratios."""
    table = [["", *columns, *(f"{OURS} ÷ {name}" for name in others)]]
    for result in results:
        cells = [f"{result.title}, {result.unit}" + ("" if result.higher_is_better else " (less is better)")]
        for name in columns:
            if name not in result.values:
                cells.append("-")
                continue
            values = result.values[name]
            cells.append(f"{number(result.median(name))} ({number(min(values))}-{number(max(values))})")
        both = OURS in result.values
        cells += [f"{result.ratio(OURS, n):.2f}" if both and n in result.values else "-" for n in others]
        table.append(cells)
    return table


def markdown(table: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return a Markdown table and its notes."""
    head, *body = table
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n".join(notes) + "\n"


def show(table: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Print the table and its notes."""
    from rich.console import Console
    from rich.table import Table

    head, *body = table
    shown = Table(*head)
    for line in body:
        shown.add_row(*line)
    # A pipe has no width: wide enough that no cell is broken.
    console = Console() if os.isatty(1) else Console(width=200)
    console.print(shown)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, with both kinds of ratio."""
    quantities = []
    for result in results:
        others = [name for name in result.values if name != OURS and OURS in result.values]
        quantities.append(
            vars(result)
            | {
                "medians": {name: result.median(name) for name in result.values},
                "ratios": {name: result.ratio(OURS, name) for name in others},
                "paired_ratios": {name: result.paired_ratio(OURS, name) for name in others},
            }
        )
    return {"about": dict(about), "results": quantities}
