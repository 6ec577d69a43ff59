"""How the processes of a run find one another."""

from __future__ import annotations

import jax


def initialize(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Join this process to the others of its run; before anything touches a device.

    Args:
        coordinator: `host:port` of process 0; `None`: found from SLURM, Kubernetes, MPI or the TPU pod.
        processes: how many there are.
        process_id: which of them this is, from 0.
    """
    jax.distributed.initialize(coordinator, processes, process_id)


def is_first() -> bool:
    """Whether this process speaks for all: it alone logs, draws bars and writes what is written once."""
    return jax.process_index() == 0
