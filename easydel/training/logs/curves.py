"""Curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from easydel.training.logs.sinks import Record


def draw_curves(records: Sequence[Record], picture: Path, title: str = "") -> None:
    """Draw the losses and the learning rate over the steps.

    Args:
        records: of a log.
        picture: a PNG file.
        title: written above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib: pip install 'easydel-base[train]', or leave 'png' out of log_to"
        ) from error
    figure = Figure(figsize=(8, 6), layout="constrained")  # no pyplot: no window system, no global state
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, label, marker in (("loss", "training", ""), ("eval_loss", "evaluation", "o")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            above.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
    above.set_title(title)
    above.set_ylabel("loss (nats per token)")
    if above.lines:
        above.legend()
    above.grid(alpha=0.3)
    rates = [(record["step"], record["learning_rate"]) for record in records if "learning_rate" in record]
    if rates:
        below.plot(*zip(*rates, strict=True), color="tab:gray")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
