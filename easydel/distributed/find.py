"""Which run this process belongs to: what it was told, else what the cluster that started it says."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from easydel.errors import DistributedError

VARIABLES = {"coordinator": "EASYDEL_COORDINATOR", "processes": "EASYDEL_PROCESSES", "process_id": "EASYDEL_PROCESS_ID"}
"""Environment variables that say what an option does not."""

_FIRST_HOST = re.compile(r"(?P<name>[^,\[]+)(?:\[(?P<number>\d+)[^\]]*\])?(?P<rest>[^,]*)")


@dataclass(frozen=True)
class Place:
    """This process's place in a run of several.

    Attributes:
        coordinator: `host:port` on which process 0 meets the others.
        processes: how many there are.
        process_id: which of them this is, from 0.
        local_devices: numbers of the devices of this host that are this process's; `None`: all.
    """

    coordinator: str
    processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """Of process 0; an IPv6 address without its brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """On which process 0 listens."""
        return int(self.coordinator.rpartition(":")[2])


def find_place(
    coordinator: str | None, processes: int | None, process_id: int | None, environment: Mapping[str, str], wait: float
) -> Place | None:
    """Return this process's place in its run; `None` if it is alone.

    An option wins over its variable, and that over what SLURM, Kubernetes, Open MPI or a TPU pod tells.

    Args:
        coordinator: `host:port` of process 0.
        processes: how many there are.
        process_id: which this is.
        environment: such as `os.environ`.
        wait: seconds that a look-up in the cluster may take.

    Raises:
        DistributedError: a part is missing or makes no sense.
    """
    told: dict[str, str | int | None] = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    for name, variable in VARIABLES.items():
        if told[name] is None and variable in environment:
            told[name] = environment[variable]
    if told["processes"] is not None and _number("processes", told["processes"]) == 1:
        return None
    local: tuple[int, ...] | None = None
    if None in told.values():
        found, local = _from_cluster(environment, told, wait)
        if found.get("processes") == 1 and told["processes"] is None:
            return None
        told = {name: found.get(name) if value is None else value for name, value in told.items()}
    missing = [name for name, value in told.items() if value is None]
    if len(missing) == len(told):
        return None
    if missing:
        raise DistributedError(
            f"{', '.join(f'{name}={value!r}' for name, value in told.items() if value is not None)} given, but not "
            f"{', '.join(missing)}, and no cluster tells: set {', '.join(VARIABLES[name] for name in missing)} or the "
            f"options --{', --'.join(name.replace('_', '-') for name in missing)}"
        )
    return _checked(str(told["coordinator"]), told["processes"], told["process_id"], local)


def _checked(coordinator: str, processes: object, process_id: object, local: tuple[int, ...] | None) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise DistributedError(f"coordinator={coordinator!r}: expected host:port of process 0, such as node-0:29400")
    count, number = _number("processes", processes), _number("process_id", process_id)
    if count < 1:
        raise DistributedError(f"processes={count}: a run has at least one process")
    if not 0 <= number < count:
        raise DistributedError(f"process_id={number} is none of 0 to {count - 1}, those of a run of {count} processes")
    return Place(coordinator, count, number, local)


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise DistributedError(f"{name}={value!r}: expected a whole number") from None


def _from_cluster(
    environment: Mapping[str, str], told: Mapping[str, object], wait: float
) -> tuple[dict[str, str | int], tuple[int, ...] | None]:
    """Return what the cluster tells, and the local devices it gives this process (`None`: all)."""
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_JOB_ID" in environment and not any(told.values()):
        raise DistributedError(
            f"SLURM gave this job {environment['SLURM_NTASKS']} tasks, but this process was not started by srun: write "
            "srun before the command, or --processes 1 for a run of one process"
        )
    if "JOB_COMPLETION_INDEX" in environment and "TPU_WORKER_HOSTNAMES" not in environment:
        index: dict[str, str | int] = {"process_id": environment["JOB_COMPLETION_INDEX"]}  # of an indexed Job
        if any(value is not None for value in told.values()):
            return index, None
        if importlib.util.find_spec("kubernetes") is None:
            raise DistributedError(
                f"this is pod {index['process_id']} of an indexed Job: set {VARIABLES['coordinator']} to host:port of "
                f"pod 0 and {VARIABLES['processes']} to the number of pods (1 for pods that train alone)"
            )
    return _from_jax(wait)


def _slurm(environment: Mapping[str, str]) -> tuple[dict[str, str | int], tuple[int, ...] | None]:
    """Return what a SLURM step tells: the first host of its list, and a port that follows from the job's number.

    JAX would give each process a single device; here one that has its node to itself has all devices of it.
    """
    first = re.match(
        r"(?P<name>[^,\[]+)(?:\[(?P<number>\d+)[^\]]*\])?(?P<rest>[^,]*)", environment["SLURM_STEP_NODELIST"]
    )
    assert first is not None  # the name of a host is not empty
    host = first["name"] + (first["number"] or "") + first["rest"]
    port = 61440 + int(environment.get("SLURM_JOB_ID", 0)) % 4096
    count = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    alone = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == count
    found: dict[str, str | int] = {
        "coordinator": f"{host}:{port}", "processes": int(count), "process_id": environment["SLURM_PROCID"],
    }  # fmt: skip
    return found, None if alone else (int(environment.get("SLURM_LOCALID", 0)),)


def _from_jax(wait: float) -> tuple[dict[str, str | int], tuple[int, ...] | None]:
    """Return what JAX finds out by itself: under Open MPI, in a TPU pod, in a Kubernetes Job that may be asked."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; there is no public name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in any pod of Kubernetes it would recommend a package
        address, count, number, local = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(wait)
        )
    found = {"coordinator": address, "processes": count, "process_id": number}
    return {name: value for name, value in found.items() if value is not None}, tuple(local) if local else None
