"""Which logs a run keeps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from easydel.training.logs.console import ConsoleLog
from easydel.training.logs.files import CurvesLog, JsonLog, TensorBoardLog
from easydel.training.logs.sinks import Log

if TYPE_CHECKING:
    from easydel.training.arguments import TrainingArguments

LOGS = ("console", "jsonl", "tensorboard", "png")
_NEEDS = {"tensorboard": "tensorboardX", "png": "matplotlib"}


def chosen_logs(arguments: TrainingArguments, directory: Path) -> list[Log]:
    """Return the logs that the arguments name, all that can be had if they name none; only process 0 keeps any.

    Raises:
        ImportError: a log was asked for by name whose package is missing.
    """
    if jax.process_index():
        return []
    names = arguments.log_to
    if names is None:
        names = tuple(name for name in LOGS if name not in _NEEDS or find_spec(_NEEDS[name]))
    for name in names:
        if name in _NEEDS and find_spec(_NEEDS[name]) is None:  # now, and not when the run ends
            raise ImportError(
                f"the log {name!r} needs {_NEEDS[name]}: pip install 'easydel-base[train]', or leave it out of log_to"
            )
    file = directory / "log.jsonl"
    made: dict[str, Log] = {}
    if "console" in names:
        made["console"] = ConsoleLog()
    if "jsonl" in names or "png" in names:
        made["jsonl"] = JsonLog(file)
    if "tensorboard" in names:
        made["tensorboard"] = TensorBoardLog(directory / "tensorboard")
    if "png" in names:
        made["png"] = CurvesLog(file, directory / "curves.png")
    return list(made.values())
