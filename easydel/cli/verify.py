"""`easydel verify`: does a checkpoint give here what it gives in transformers, and if not, where does it begin?"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from easydel.sharding.explain_text import WIDTH
from easydel.verification import Part, Verification, verify
from easydel.verification.report import error_text, verdict_of


def run_verify(source: str, *, as_json: bool, **options: Any) -> bool:
    """Print how a checkpoint compares with transformers; return whether it is equal.

    Args:
        source: a folder or a Hub id.
        as_json: print a dictionary instead of a table.
        **options: as in `verify`.
    """
    found = verify(source, **options)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return found.equal
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"{found.model} in {found.dtype}, {found.batch} × {found.length} tokens\n")
    console.print(_table(found))
    console.print(f"\n{found.verdict()}", soft_wrap=True)
    return found.equal


def _table(found: Verification) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("largest relative error", justify="right")
    table.add_column("verdict")
    for part in found.parts:
        _add(table, part, "")
        for one in found.inside_of(part):
            _add(table, one, "  ")
    return table


def _add(table: Table, part: Part, indent: str) -> None:
    table.add_row(f"{indent}{part.name}", error_text(part), verdict_of(part), style=None if part.agrees else "red")
