"""Where a run's numbers go: a progress bar, JSON lines, TensorBoard, curves."""

from easydel.training.logs.console import ConsoleLog
from easydel.training.logs.curves import draw_curves
from easydel.training.logs.files import JsonLog, TensorBoardLog, read_log
from easydel.training.logs.sinks import Log, Logs, Record

__all__ = ["ConsoleLog", "JsonLog", "Log", "Logs", "Record", "TensorBoardLog", "draw_curves", "read_log"]
