"""`easydel plan`: what a training step takes on each device of a mesh that need not exist here."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from easydel.cli.tables import bytes_text
from easydel.hub.save import parse_size
from easydel.planning import Plan, Suggestion, plan_training, suggest_mesh
from easydel.planning.report import plan_view
from easydel.sharding.explain_text import WIDTH


def run_plan(
    source: str, *, mesh: str | None, devices: int | None, memory: str | None, as_json: bool, **options: Any
) -> None:
    """Print a plan for a mesh, or meshes that fit and the plan for the best.

    Args:
        source: a folder with a `config.json` or a Hub id, of which nothing else is fetched.
        mesh: such as `fsdp=64,tp=8`.
        devices: how many there are, if a mesh is looked for.
        memory: of each device, such as `80GB`.
        as_json: print a dictionary instead of tables.
        **options: as in `plan_training`.

    Raises:
        ValueError: neither a mesh, nor devices and their memory; or both.
    """
    suggestions: tuple[Suggestion, ...] = ()
    if mesh is not None and devices is None:
        plan = plan_training(source, mesh, **options)
    elif mesh is None and devices is not None and memory is not None:
        suggestions = suggest_mesh(source, devices, memory, **options)
        plan = suggestions[0].plan
    else:
        raise ValueError("give a mesh (--mesh fsdp=64,tp=8), or have one looked for (--devices 512 --memory 80GB)")
    if as_json:
        print(json.dumps(_plain(plan, suggestions, memory), indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if suggestions:
        console.print(_suggestion_table(suggestions))
        console.print()
    console.print(plan_view(plan))
    if memory is not None:
        console.print(f"\n{_verdict(plan, memory)}")


def _plain(plan: Plan, suggestions: tuple[Suggestion, ...], memory: str | None) -> dict[str, Any]:
    found = plan.to_dict()
    if memory is not None:
        found["fits"] = plan.fits(parse_size(memory, "memory"))
    if suggestions:
        found["suggestions"] = [
            {"axes": s.axes, "remat": s.remat, "collective_bytes": s.collective_bytes,
             "total_bytes_per_device": s.plan.total_bytes_per_device}
            for s in suggestions
        ]  # fmt: skip
    return found


def _verdict(plan: Plan, memory: str) -> str:
    room = parse_size(memory, "memory")
    if plan.fits(room):
        return f"fits into {memory}: {bytes_text(room - plan.total_bytes_per_device)} are left"
    others = [policy for policy in plan.bytes_per_device["total"] if plan.fits(room, policy)]
    hint = f"; with --remat {' or '.join(others)} it fits" if others else ""
    return f"does not fit into {memory}: {bytes_text(plan.total_bytes_per_device - room)} are missing{hint}"


def _suggestion_table(suggestions: tuple[Suggestion, ...]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("mesh")
    table.add_column("remat")
    table.add_column("a step in all", justify="right")
    table.add_column("collectives", justify="right")
    for suggestion in suggestions:
        axes = ",".join(f"{name}={size}" for name, size in suggestion.axes.items() if size > 1) or "one device"
        total = bytes_text(suggestion.plan.total_bytes_per_device)
        table.add_row(axes, suggestion.remat, total, bytes_text(suggestion.collective_bytes))
    return table
