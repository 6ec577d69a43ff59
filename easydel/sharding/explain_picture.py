"""An explanation of sharding as a picture: parameters down, devices across, the colour says which part lies there."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easydel.sharding.explain_text import bytes_text, group_rows, mesh_text, over_layers, spec_text

if TYPE_CHECKING:
    from easydel.sharding.explain import Placement, ShardingExplanation

DEVICES = 64  # columns; more are no longer told apart
PLOT_MISSING = "drawing a PNG needs matplotlib: pip install 'easydel-base[plot]', or save as .html, which needs nothing"


@dataclass(frozen=True)
class _Line:
    """One row of the picture.

    Attributes:
        name: of the parameters.
        note: how they are split, and what a device holds of them.
        parts: into how many parts they are split.
        held: which part each device holds, int `[devices]`.
    """

    name: str
    note: str
    parts: int
    held: np.ndarray


def save_picture(explanation: ShardingExplanation, path: Path) -> None:
    """Draw an explanation; see `ShardingExplanation.save`."""
    suffix = path.suffix.lower()
    if suffix not in (".png", ".html", ".htm"):
        raise ValueError(f"{path}: a picture is a .png or .html file, got {suffix or 'no suffix'!r}")
    lines = [_line(group, explanation) for group in group_rows((*explanation.parameters, *explanation.state))]
    if suffix == ".png":
        _draw(explanation, lines, path)
    else:
        path.write_text(_page(explanation, lines), encoding="utf-8")


def held_parts(row: Placement, axes: tuple[tuple[str, int], ...]) -> np.ndarray:
    """Return which part of an array each device of a mesh holds, parts counted in row-major order, int `[devices]`."""
    sizes = dict(axes)
    names, dims = list(sizes), list(sizes.values())
    coordinates = np.indices(dims).reshape(len(dims), -1)  # [axes, devices]
    part = np.zeros(coordinates.shape[1], np.int64)
    for entry in row.actual:
        for axis in () if entry is None else entry if isinstance(entry, tuple) else (entry,):
            part = part * sizes[axis] + coordinates[names.index(axis)]
    return part


def _line(group: list[Placement], explanation: ShardingExplanation) -> _Line:
    first = group[0]
    name = f"{over_layers(first.path)} (× {len(group)})" if len(group) > 1 else first.path
    held = held_parts(first, explanation.axes)
    per_device = bytes_text(sum(row.bytes_per_device for row in group))
    return _Line(name, f"{spec_text(first.actual)}; {per_device} a device", int(held.max()) + 1, held)


def _title(explanation: ShardingExplanation) -> str:
    count = len(explanation.device_ids)
    shown = f", the first {DEVICES} of them shown" if count > DEVICES else ""
    device, held = explanation.fullest_device
    return (
        f"{mesh_text(explanation)}{shown}; {bytes_text(explanation.bytes)} in all, "
        f"{bytes_text(held)} on the fullest (device {device})"
    )


def _draw(explanation: ShardingExplanation, lines: list[_Line], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(PLOT_MISSING) from error
    ids = explanation.device_ids[:DEVICES]
    # A whole array is grey; a part has a hue of its own.
    cells = np.array([np.where(line.parts > 1, line.held / max(line.parts - 1, 1), np.nan) for line in lines])
    figure = Figure(figsize=(6 + 0.22 * len(ids), 1.6 + 0.26 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window system, no global state
    axes = figure.add_subplot()
    axes.set_facecolor("#d0d0d0")
    axes.imshow(cells[:, : len(ids)], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(lines)), [f"{line.name}   {line.note}" for line in lines], fontsize=7)
    step = max(1, len(ids) // 16)
    axes.set_xticks(range(0, len(ids), step), [str(i) for i in ids[::step]], fontsize=7)
    axes.set_xlabel("device (grey: holds all; colour: which part it holds)")
    axes.set_yticks(np.arange(len(lines) - 1) + 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white")
    axes.tick_params(which="minor", left=False)
    figure.suptitle(_title(explanation), fontsize=8)  # of the figure: centred on the axes, it would be cut off
    figure.savefig(path, dpi=120)


_STYLE = """
body{font:14px system-ui,sans-serif;margin:2em;color:#222;background:#fff}
table{border-collapse:collapse}
th{font-weight:normal;text-align:left;padding:1px 8px;white-space:nowrap}
th.device{text-align:center;padding:1px 3px;font-size:11px}
td{min-width:16px;height:18px;border:1px solid #fff;font-size:10px;text-align:center;color:#fff}
td.all{background:#d0d0d0}
.note{color:#666}
"""


def _page(explanation: ShardingExplanation, lines: list[_Line]) -> str:
    ids = explanation.device_ids[:DEVICES]
    head = "".join(f'<th class="device">{i}</th>' for i in ids)
    rows = "\n".join(
        f'<tr><th>{html.escape(line.name)}</th><th class="note">{html.escape(line.note)}</th>'
        + "".join(_cell(line, position) for position in range(len(ids)))
        + "</tr>"
        for line in lines
    )
    title, report = html.escape(_title(explanation)), html.escape(str(explanation))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Sharding</h1><p>{title}</p>\n"
        '<p class="note">Grey: the device holds all of it. A colour and number: which part it holds.</p>\n'
        f"<table><tr><th></th><th></th>{head}</tr>\n{rows}\n</table>\n<pre>{report}</pre></body></html>\n"
    )


def _cell(line: _Line, device: int) -> str:
    part = int(line.held[device])
    if line.parts == 1:
        return '<td class="all" title="all of it"></td>'
    hue = 360 * part // line.parts
    return f'<td style="background:hsl({hue},55%,42%)" title="part {part} of {line.parts}">{part}</td>'
