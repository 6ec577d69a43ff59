"""An explanation of sharding in words: tables for people, a dictionary for programs."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

    from easydel.sharding.explain import Placement, RuleUse, ShardingExplanation

WIDTH = 160
SHOWN = 12  # notes of a kind


def spec_text(spec: PartitionSpec | None) -> str:
    """Return a `PartitionSpec` the way one would say it: `fsdp, tp`, or `whole` if nothing is split."""
    parts = ["+".join(axis) if isinstance(axis, tuple) else str(axis or "·") for axis in spec or ()]
    return ", ".join(parts) if any(part != "·" for part in parts) else "whole"


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units: `8.3 MB`."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def over_layers(text: str) -> str:
    """Return a path or pattern with `*` for the numbers of layers."""
    return re.sub(r"(?<=/)\d+(?=/)", "*", text)


def group_rows(rows: Sequence[Placement]) -> list[list[Placement]]:
    """Put together what differs only in its layer."""
    groups: dict[Any, list[Placement]] = {}
    for row in rows:
        rule = None if row.pattern is None else over_layers(row.pattern)
        key = (over_layers(row.path), row.shape, row.dtype, rule, row.requested, row.actual)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _plain_table(*columns: str, right: Sequence[str] = (), **options: Any) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, title_justify="left", **options)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def parameter_table(explanation: ShardingExplanation) -> Table:
    """Lay out what becomes of each parameter, and of the state if there is any."""
    names = ("parameter", "×", "shape", "rule", "split over", "in all", "per device")
    table = _plain_table(*names, right=("×", "in all", "per device"), show_footer=True)
    rows = (*explanation.parameters, *explanation.state)
    totals = ("total", str(len(rows)), "", "", "", bytes_text(explanation.bytes))
    for column, footer in zip(table.columns, (*totals, bytes_text(explanation.fullest_device[1])), strict=True):
        column.footer = footer
    for kind, part in (("—", explanation.parameters), ("state", explanation.state)):
        for group in group_rows(part):
            first = group[0]
            cells = (
                over_layers(first.path) if len(group) > 1 else first.path,
                str(len(group)),
                f"{' × '.join(map(str, first.shape)) or 'scalar'} {first.dtype}",
                kind if first.rule is None else f"[{first.rule}] {over_layers(first.pattern or '')}",
                _split_text(first),
                bytes_text(sum(row.bytes for row in group)),
                bytes_text(sum(row.bytes_per_device for row in group)),
            )
            table.add_row(*map(Text, cells))
    return table


def _split_text(row: Placement) -> str:
    asked = f" (asked: {spec_text(row.requested)})" if row.dropped else ""
    return spec_text(row.actual) + asked


def rule_table(rules: Sequence[RuleUse]) -> Table:
    """Lay out what each rule does; rules that differ only in the layer they name come together."""
    table = _plain_table("", "rule", "asks for", "decides over", "note", right=("", "decides over"))
    groups: dict[Any, list[RuleUse]] = {}
    for rule in rules:
        groups.setdefault((over_layers(rule.pattern), rule.spec, rule.is_dead, rule.is_shadowed), []).append(rule)
    for (pattern, spec, *_), group in groups.items():
        several = f"[{group[0].index}] … ({len(group)})"
        cells = (
            several if len(group) > 1 else f"[{group[0].index}]",
            pattern if len(group) > 1 else group[0].pattern,
            spec_text(spec),
            str(sum(rule.chosen for rule in group)),
            rule_note(group[0]),
        )
        table.add_row(*map(Text, cells))
    return table


def rule_note(rule: RuleUse) -> str:
    """Say what is amiss with a rule, if something is."""
    if rule.is_dead:
        return "dead: matches no parameter"
    if rule.is_shadowed:
        return f"shadowed by {_winners(rule)}: comes too late for all {rule.matching} it matches"
    if rule.behind:
        return f"{rule.matching - rule.chosen} more it matches are decided by {_winners(rule)}"
    return ""


def _winners(rule: RuleUse) -> str:
    return ", ".join(f"[{index}]" for index, _ in rule.behind[:SHOWN]) + (" …" if len(rule.behind) > SHOWN else "")


def _notes(explanation: ShardingExplanation) -> list[str]:
    """Say what was dropped, once for parameters that differ only in their layer."""
    counts: dict[str, int] = {}
    for axis in explanation.dropped:
        line = f"{over_layers(axis.path)}: {axis.reason}; {axis.axis} dropped"
        counts[line] = counts.get(line, 0) + 1
    lines = [line if count == 1 else f"{line} (× {count})" for line, count in counts.items()]
    return lines[:SHOWN] + ([f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


def mesh_text(explanation: ShardingExplanation) -> str:
    """Name the axes that split something, and the number of devices."""
    axes = ", ".join(f"{name}={size}" for name, size in explanation.axes if size > 1) or "no axis above 1"
    count = len(explanation.device_ids)
    return f"mesh {axes}: {count} device{'s' if count != 1 else ''}"


def tables(explanation: ShardingExplanation) -> Group:
    """Return all there is to show, for a `rich` console."""
    device, held = explanation.fullest_device
    total = f"{bytes_text(explanation.bytes)} in all, {bytes_text(held)} on each device (the fullest: {device})"
    notes = _notes(explanation)
    dropped = [Text(line) for line in ("", "dropped:", *(f"  {note}" for note in notes))] if notes else []
    head = Text(f"{mesh_text(explanation)}; {total}\n")
    return Group(head, parameter_table(explanation), Text(), rule_table(explanation.rules), *dropped)


def render(explanation: ShardingExplanation) -> str:
    """Return all there is to show as plain text."""
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, highlight=False, color_system=None).print(tables(explanation))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def to_dict(explanation: ShardingExplanation) -> dict[str, Any]:
    """Return everything as what `json` can write."""
    device, held = explanation.fullest_device
    return {
        "mesh": dict(explanation.axes),
        "devices": len(explanation.device_ids),
        "bytes": explanation.bytes,
        "bytes_per_device": {str(device): held for device, held in explanation.bytes_per_device.items()},
        "fullest_device": {"device": device, "bytes": held},
        "parameters": [_row(row) for row in explanation.parameters],
        "state": [_row(row) for row in explanation.state],
        "rules": [
            {
                "index": rule.index,
                "pattern": rule.pattern,
                "spec": _spec(rule.spec),
                "decides_over": rule.chosen,
                "matches": rule.matching,
                "behind": [index for index, _ in rule.behind],
                "dead": rule.is_dead,
                "shadowed": rule.is_shadowed,
            }
            for rule in explanation.rules
        ],
    }


def _row(row: Placement) -> dict[str, Any]:
    return {
        "path": row.path,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "rule": row.rule,
        "pattern": row.pattern,
        "requested": _spec(row.requested),
        "actual": _spec(row.actual),
        "dropped": [{"axis": d.axis, "dimension": d.dimension, "reason": d.reason} for d in row.dropped],
        "bytes": row.bytes,
        "bytes_per_device": row.bytes_per_device,
    }


def _spec(spec: PartitionSpec) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]
