"""A process that imports everything once and then forks workers: they start in a moment, and can be killed.

`python -m tests.distributed.forks` serves requests, one a line: `start CALL LOG ENVIRONMENT`, where CALL is what
`tests.distributed.worker` takes, answered with the process's id; `poll ID`, answered with its exit code or `running`. A
worker goes to the end of the program as any process does: what is registered for exit runs, an error ends it with 1.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.launch import ROOT, _flags, free_port


@dataclass
class Forked:
    """A worker."""

    server: Server
    pid: int
    log: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            answer = self.server.ask("poll", str(self.pid))
            self.returncode = None if answer == "running" else int(answer)
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"still running after {timeout} s:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)
        return self.returncode

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """The forking process, as seen by a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.forks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        print(*words, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    @contextlib.contextmanager
    def run(
        self, worker: Callable[..., Any], processes: int, devices: int, folder: Path, *arguments: Any
    ) -> Iterator[list[Forked]]:
        """Start `worker(*arguments)` in all processes; what is left of them at the end is killed."""
        folder.mkdir(parents=True, exist_ok=True)
        port, started = free_port(), []
        name = f"{worker.__module__}:{worker.__qualname__}"
        try:
            for number in range(processes):
                call = pickle.dumps((name, number, processes, devices, port, str(folder), arguments)).hex()
                log = folder / f"process-{number}.log"
                environment = os.environ | {"XLA_FLAGS": _flags(devices)}
                pid = self.ask("start", call, str(log), pickle.dumps(environment).hex())
                started.append(Forked(self, int(pid), log))
            yield started
        finally:
            for one in started:
                one.send(signal.SIGKILL)
                one.wait(10)


def result(folder: Path, number: int) -> Any:
    """What the function returned in a process."""
    return pickle.loads((folder / f"process-{number}.pickle").read_bytes())


def serve() -> bool:
    """Serve requests; return whether this is a worker now."""
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "start":
            call, log, environment = rest
            pid = os.fork()
            if pid == 0:
                os.environ.update(pickle.loads(bytes.fromhex(environment)))
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for target, source in ((0, nothing), (1, file), (2, file)):
                    os.dup2(source, target)
                sys.argv = ["worker", call]
                return True
            print(pid, flush=True)
        else:
            pid, status = os.waitpid(int(rest[0]), os.WNOHANG)
            print("running" if pid == 0 else os.waitstatus_to_exitcode(status), flush=True)
    return False


if __name__ == "__main__":
    from tests.distributed import worker

    importlib.import_module("tests.distributed.runs")  # with all that the workers need
    gc.freeze()  # what is shared by all workers need not be looked through when each of them ends
    if serve():
        worker.main()
