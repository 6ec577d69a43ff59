"""`easydel train`: a run as a YAML file describes it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from easydel import distributed
from easydel.training import eLargeModel
from easydel.training.yaml_files import read_yaml


@dataclass(frozen=True)
class Placing:
    """Where this process stands in a run of several; see `easydel.distributed.initialize`."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    peer_timeout: float | None = None


def run_train(file: Path, settings: Sequence[str], *, check: bool, place: Placing | None = None) -> int:
    """Train, or only say what would be trained.

    Returns:
        The exit code: 0, also after SIGTERM, by which a scheduler asks a run to save and make room; 130 after Ctrl-C;
        75 if another process of the run was lost.
    """
    place = place or Placing()
    elarge = eLargeModel.from_yaml(file, dict(map(read_setting, settings)))
    distributed.initialize(
        place.coordinator, place.processes, place.process_id, agreed=elarge.config, peer_timeout=place.peer_timeout
    )
    with distributed.telling_the_others():
        return _run(elarge, check=check)


def _run(elarge: eLargeModel, *, check: bool) -> int:
    console = Console(stderr=True, highlight=False, quiet=not distributed.is_first())
    trainer = elarge.build_trainer()
    steps = "as many as the data have" if trainer.total_steps is None else f"{trainer.total_steps:,}"
    console.print(f"{trainer.state.summary()}; steps: {steps}; to {trainer.directory}", soft_wrap=True)
    if trainer.mesh is not None:
        console.print("mesh: " + ", ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items()))
    if check:
        console.print(trainer.state.summary().table())
        return 0
    result = trainer.train()
    progress = result.progress
    console.print(
        f"{result.reason}: {progress.iteration:,} steps, {progress.tokens:,} tokens in {progress.seconds:.0f} s"
        + (f", {progress.skipped} skipped" if progress.skipped else "")
    )
    return 130 if result.reason == signal.SIGINT.name else 0


def read_setting(text: str) -> tuple[str, Any]:
    """Read `section.name=value`; the value as YAML reads it.

    Raises:
        ValueError: it has no `=`, or the value is no YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set {text!r}: expected SECTION.NAME=VALUE, such as training.max_steps=100")
    return name, read_yaml(value, f"--set {name}")
