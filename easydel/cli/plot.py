"""The loss curve as a picture (needs the `plot` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PLOT_MISSING = "matplotlib is missing, no picture is drawn; install it with: pip install 'easydel-base[plot]'"


def save_loss_curve(losses: Sequence[float], path: Path, title: str) -> bool:
    """Draw the training loss per step as a PNG; return False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: no window system, no global state
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    return True
