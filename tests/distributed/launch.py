"""Runs a test's function in several processes that form one run."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(worker: Callable[..., Any], processes: int, devices: int, folder: Path, *arguments: Any) -> list[Any]:
    """Start `worker(*arguments)`, a function at the top of a module, in so many processes of so many CPU devices each.

    Returns the `subprocess.Popen` of each; its output goes to `folder/process-N.log`, what the function returns to
    `folder/process-N.pickle`.
    """
    port, started = free_port(), []
    name = f"{worker.__module__}:{worker.__qualname__}"
    for number in range(processes):
        call = pickle.dumps((name, number, processes, devices, port, str(folder), arguments))
        environment = os.environ | {"XLA_FLAGS": _flags(devices), "PYTHONUNBUFFERED": "1"}
        with (folder / f"process-{number}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.distributed.worker", call.hex()]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def run(worker: Callable[..., Any], processes: int, devices: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Run `worker(*arguments)` in all processes and return what each of them returned, in their order.

    Raises:
        AssertionError: one failed, with the end of its log, or took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        started = start(worker, processes, devices, folder, *arguments)
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [(folder / f"process-{number}.log").read_text()[-4000:] for number in range(processes)]
        failed = [
            f"process {n}: exit {code}\n{log}" for n, (code, log) in enumerate(zip(codes, logs, strict=True)) if code
        ]
        assert not failed, "\n".join(failed)
        return [pickle.loads((folder / f"process-{number}.pickle").read_bytes()) for number in range(processes)]


def _flags(devices: int) -> str:
    """Return this process's flags with another number of simulated devices."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
