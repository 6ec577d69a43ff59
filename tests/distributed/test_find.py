"""Which run a process belongs to: options, variables and clusters, and what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from easydel.distributed.find import Place, find_place
from easydel.errors import DistributedError

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[007-010,12],other", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "5",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


def find(*given: Any, **environment: str) -> Place | None:
    coordinator, processes, process_id = given or (None, None, None)
    return find_place(coordinator, processes, process_id, environment, 1)


def test_options_win_over_variables() -> None:
    told = {"EASYDEL_COORDINATOR": "there:1", "EASYDEL_PROCESSES": "3", "EASYDEL_PROCESS_ID": "2"}
    assert find(**told) == Place("there:1", 3, 2)
    assert find("here:2", None, 0, **told) == Place("here:2", 3, 0)
    place = find("[fe80::1]:7", 2, 1)
    assert place is not None
    assert (place.host, place.port) == ("fe80::1", 7)


def test_one_process_is_no_run_of_several() -> None:
    assert find() is None
    assert find(None, 1, None, EASYDEL_COORDINATOR="there:1") is None
    assert find(**SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-010,12],other", "gpu007"), ("gpu[07,12]-ib", "gpu07-ib"), ("one", "one"), ("one,two", "one"),
        ("a-b[3]", "a-b3"),
    ],
)  # fmt: skip
def test_a_slurm_step_tells_all(nodes: str, first: str) -> None:
    assert find(**SLURM | {"SLURM_STEP_NODELIST": nodes}) == Place(f"{first}:{61440 + 4}", 5, 2)


def test_several_tasks_of_a_node_share_its_devices() -> None:
    place = find(**SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"})
    assert place is not None
    assert place.local_devices == (2,)


def test_a_pod_of_an_indexed_job_knows_its_number() -> None:
    assert find("job-0.net:29400", 4, None, **POD) == Place("job-0.net:29400", 4, 3)
    assert find(None, 1, None, **POD) is None


@pytest.mark.parametrize(
    ("given", "environment", "said"),
    [
        (("here:1", 2, 2), {}, "process_id=2 is none of 0 to 1, those of a run of 2 processes"),
        (("here:1", 2, -1), {}, "process_id=-1 is none of 0 to 1"),
        (("here:1", 0, 0), {}, "processes=0: a run has at least one process"),
        (("here:1", None, None), {"EASYDEL_PROCESSES": "two"}, "processes='two': expected a whole number"),
        (("here", 2, 0), {}, "coordinator='here': expected host:port"),
        (("here:70000", 2, 0), {}, "coordinator='here:70000': expected host:port"),
        (("fe80::1:7", 2, 0), {}, "expected host:port"),
        (("here:1", None, 0), {}, r"given, but not processes, and no cluster tells: set EASYDEL_PROCESSES or the "),
        ((None, 2, None), {}, "set EASYDEL_COORDINATOR, EASYDEL_PROCESS_ID or the options --coordinator, --process-id"),
        ((None, None, None), POD, "this is pod 3 of an indexed Job: set EASYDEL_COORDINATOR"),
        (
            (None, None, None),
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "SLURM gave this job 4 tasks, but this process was not started by srun",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given: Any, environment: dict[str, str], said: str) -> None:
    with pytest.raises(DistributedError, match=said):
        find(*given, **environment)


def test_other_clusters_are_asked_through_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI, of which JAX reads the environment."""
    for name, value in {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    place = find()
    assert place is not None
    assert (place.host, place.processes, place.process_id, place.local_devices) == ("10.96.0.1", 2, 1, (0,))
