"""How the processes of a run find one another, and how they part."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax

from easydel.distributed.aborts import delay_aborts
from easydel.distributed.find import find_place
from easydel.distributed.fingerprint import fingerprint
from easydel.distributed.meeting import meet
from easydel.distributed.watch import Watch
from easydel.errors import DistributedError

_watch: Watch | None = None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    agreed: Mapping[str, Any] | None = None,
    wait: float | None = None,
    peer_timeout: float | None = None,
) -> None:
    """Join this process to the others of its run; before anything touches a device.

    What is not given is taken from `EASYDEL_COORDINATOR`, `EASYDEL_PROCESSES` and `EASYDEL_PROCESS_ID`, else from
    SLURM, Kubernetes, Open MPI or the TPU pod. A process that is alone in its run is left as it is.

    From then on the processes watch over one another. When one dies, falls silent for `peer_timeout` seconds, or ends
    with an error that nobody catches, each of the others says so on stderr and ends with exit code 75.

    Args:
        coordinator: `host:port` of process 0, on which it listens.
        processes: how many there are.
        process_id: which of them this is, from 0.
        agreed: what must be the same in all processes, such as a configuration; versions and code are compared anyway.
        wait: seconds within which all processes must have come; `None`: from `EASYDEL_WAIT`, else 300.
        peer_timeout: seconds of silence after which a process counts as lost, as process 0 has it; `None`: from
            `EASYDEL_PEER_TIMEOUT`, else 60.

    Raises:
        DistributedError: the arguments make no sense, a process did not come in time, or two do not fit together.
    """
    global _watch
    limit = _seconds("peer_timeout", peer_timeout, "EASYDEL_PEER_TIMEOUT", 60)
    wait = _seconds("wait", wait, "EASYDEL_WAIT", 300)
    place = find_place(coordinator, processes, process_id, os.environ, wait)
    if place is None:
        return
    if _watch is not None:
        raise DistributedError("this process has joined its run already: initialize() is called once")
    met = meet(place, fingerprint(agreed or {}), wait, limit)
    _watch = Watch(met.members[place.process_id], met)
    _watch.start()
    sys.excepthook = _announcing(sys.excepthook)
    atexit.register(_watch.leave)
    if place.process_id:
        delay_aborts()  # process 0 has JAX's service itself
    host = f"[{place.host}]" if ":" in place.host else place.host
    jax.distributed.initialize(
        f"{host}:{met.port}",
        place.processes,
        place.process_id,
        list(place.local_devices) if place.local_devices else None,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(wait)),
        heartbeat_timeout_seconds=max(100, int(3 * met.limit)),  # the watch, which can say more, comes first
    )


def note(phase: str, step: int | None = None, checkpoints: str | None = None) -> None:
    """Take down what this process does now, for the others' messages should it be lost; what is `None` stays.

    Args:
        phase: such as `"step"`, `"data"` or `"saving"`.
        step: of the run.
        checkpoints: the folder from which the run would be taken up.
    """
    if _watch is not None:
        _watch.note(phase, step, checkpoints)


@contextlib.contextmanager
def telling_the_others() -> Iterator[None]:
    """Tell the other processes of an error within the block, which ends this process, so that they end at once."""
    try:
        yield
    except BaseException as error:
        _announce(error)
        raise


def _announce(error: BaseException) -> None:
    if _watch is None:
        return
    _watch.announce(error)
    # What Python waits for before it ends, such as a checkpoint that the others should finish, may never come.
    last = threading.Timer(5.0, os._exit, [1])
    last.daemon = True
    last.start()


def _announcing(hook: Any) -> Any:
    def announce(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        hook(kind, error, trace)
        sys.stderr.flush()
        _announce(error)

    return announce


def _seconds(name: str, given: float | None, variable: str, usual: float) -> float:
    text = os.environ.get(variable, usual) if given is None else given
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise DistributedError(f"{name}={text!r}: expected a number of seconds above 0")
    return seconds
