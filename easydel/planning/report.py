"""A plan for people, and for programs."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from easydel.sharding.explain_text import WIDTH, bytes_text

if TYPE_CHECKING:
    from easydel.planning.plan import Plan


def plain(plan: Plan) -> dict[str, Any]:
    """Return everything as what `json` can write."""
    return {
        **dataclasses.asdict(plan),
        "notes": list(plan.notes),
        "total_bytes_per_device": plan.total_bytes_per_device,
    }


def render(plan: Plan) -> str:
    """Return a plan as text."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(plan_view(plan))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def plan_view(plan: Plan) -> Group:
    """Return a plan as what `rich` prints: what it is of, memory, policies, work and notes."""
    axes = ", ".join(f"{name}={size}" for name, size in plan.axes.items() if size > 1) or "one device"
    layers = "in a scan" if plan.scan_layers else "one by one"
    head = (
        f"{plan.model}: {plan.parameters:,} parameters on {axes}\n"
        f"batch {plan.batch_size} × {plan.sequence_length} tokens, {plan.dtype} over {plan.param_dtype} parameters, "
        f"remat {plan.remat}, layers {layers}"
    )
    notes = [f"note: {note}" for note in plan.notes]
    return Group(head, "", plan_table(plan), "", policy_table(plan), "", work_table(plan), *notes)


def plan_table(plan: Plan) -> Table:
    """Lay out the bytes of each device."""
    table = _table("memory of each device", "", show_footer=True)
    held = plan.bytes_per_device
    for name in ("parameters", "gradients", "optimizer", "inputs"):
        table.add_row(name, bytes_text(held[name]))
    table.add_row("activations", bytes_text(held["activations"][plan.remat]))
    table.columns[0].footer, table.columns[1].footer = "a step in all", bytes_text(plan.total_bytes_per_device)
    return table


def policy_table(plan: Plan) -> Table:
    """Lay out what each remat policy takes."""
    table = _table("remat", "activations", "a step in all", "recomputed")
    flops = plan.flops_per_step
    for policy, size in plan.bytes_per_device["activations"].items():
        share = flops["recomputation"][policy] / max(1, flops["forward"] + flops["backward"])
        total = plan.bytes_per_device["total"][policy]
        table.add_row(policy, bytes_text(size), bytes_text(total), f"{share:.0%} of the FLOPs")
    return table


def work_table(plan: Plan) -> Table:
    """Lay out FLOPs, collectives and the cache."""
    table, flops = _table("besides", ""), plan.flops_per_step
    table.add_row("FLOPs of a step, all devices", f"{flops['total'][plan.remat]:.4g}")
    table.add_row("  forward, backward", f"{flops['forward']:.4g}, {flops['backward']:.4g}")
    for kind, by_axes in plan.collective_bytes_per_step.items():
        for axes, size in by_axes.items():
            table.add_row(f"{kind.replace('_', '-')} over {axes}, each device", bytes_text(size))
    table.add_row("cache of generation, each device", bytes_text(plan.bytes_per_device["cache"]))
    return table


def _table(first: str, *columns: str, show_footer: bool = False) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, show_footer=show_footer)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
