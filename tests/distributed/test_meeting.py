"""Processes that meet: all have to come, each once, with the same versions, code and configuration."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from easydel.distributed.find import Place
from easydel.distributed.fingerprint import differences, fingerprint
from easydel.distributed.meeting import Met, meet
from easydel.errors import DistributedError
from tests.distributed.launch import free_port

MINE = {"jax": "1.0", "training.max_steps": "4"}


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call all at the same time, each in its thread; return what they return or raise."""
    results: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        try:
            results[number] = calls[number]()
        except DistributedError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def caller(port: int, number: int, count: int = 2, mine: dict[str, str] = MINE, wait: float = 10) -> Callable[[], Met]:
    return lambda: meet(Place(f"127.0.0.1:{port}", count, number), mine, wait, 7.0 + number)


def close(results: list[Any]) -> None:
    for met in results:
        for link in met.links.values() if isinstance(met, Met) else ():
            link.close()


def test_all_meet_and_know_one_another() -> None:
    port = free_port()
    found = together(*(caller(port, number, 3) for number in (2, 0, 1)))
    assert [[member.process for member in met.members] for met in found] == [[0, 1, 2]] * 3
    assert {met.limit for met in found} == {7.0}, "that of process 0 holds"
    assert len({met.port for met in found}) == 1
    assert [sorted(met.links) for met in found] == [[0], [1, 2], [0]]
    close(found)


def test_who_looks_for_open_ports_does_no_harm() -> None:
    port = free_port()

    def stranger() -> None:
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port)) as connected:
            connected.sendall(b"GET / HTTP/1.1\r\n\r\n")

    def late() -> Met:
        time.sleep(0.5)
        return caller(port, 1)()

    *_, first, second = together(stranger, caller(port, 0), late)
    assert len(first.members) == len(second.members) == 2
    close([first, second])


def test_one_that_does_not_come_is_named_in_time() -> None:
    port, begun = free_port(), time.monotonic()
    found = together(caller(port, 0, 4, wait=1), caller(port, 2, 4, wait=1))
    assert time.monotonic() - begun < 5
    assert found[0] == found[1]  # each says the same
    assert found[0].startswith(f"processes 1, 3 of 4 did not come to 127.0.0.1:{port} within 1 s; here are process 0 (")


def test_a_coordinator_out_of_reach_is_told_in_time() -> None:
    port, begun = free_port(), time.monotonic()
    [said] = together(caller(port, 1, wait=1))
    assert time.monotonic() - begun < 3
    assert f"did not reach process 0 at 127.0.0.1:{port} within 1 s (" in said
    assert "Connection refused" in said


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("", 0)) as taken:
        [said] = together(caller(taken.getsockname()[1], 0))
    assert "cannot listen on" in said
    assert "does another run use the port?" in said


def test_the_same_number_twice_is_refused() -> None:
    port = free_port()
    found = together(caller(port, 0, 3), caller(port, 1, 3), caller(port, 1, 3))
    assert all("two processes have the same process_id: process 1 (host " in said for said in found), found


@pytest.mark.parametrize(
    ("theirs", "lines"),
    [
        ({"jax": "1.1", "training.max_steps": "4"}, ["jax: 1.0 in process 0 (", "1.1 in process 1 ("]),
        ({"jax": "1.0", "training.max_steps": "5"}, ["training.max_steps: 4 in process 0 (", "5 in process 1 ("]),
        ({"jax": "1.0"}, ["training.max_steps: 4 in process 0 (", "not set in process 1 ("]),
    ],
)
def test_what_does_not_fit_is_named_everywhere(theirs: dict[str, str], lines: list[str]) -> None:
    port = free_port()
    found = together(caller(port, 0), caller(port, 1, mine=theirs))
    for said in found:
        assert "do not fit together; give all processes the same versions, code and configuration" in said
        assert all(line in said for line in lines), said


def test_one_that_was_started_again_before_all_had_come_may_take_its_place() -> None:
    port = free_port()

    def again() -> Met:
        with socket.create_connection(("127.0.0.1", port), 5) as connected:
            hello = {"kind": "hello", "processes": 3, "fingerprint": MINE, "process": 1, "host": "gone", "pid": 1}
            connected.sendall(json.dumps(hello).encode() + b"\n")
            time.sleep(0.1)
        return caller(port, 1, 3)()

    def last() -> Met:
        time.sleep(0.5)
        return caller(port, 2, 3)()

    def first() -> Met:
        return caller(port, 0, 3)()

    time.sleep(0.1)
    found = together(first, lambda: (time.sleep(0.2), again())[1], last)
    assert "gone" not in {member.host for member in found[0].members}
    close(found)


def test_another_number_of_processes_is_refused() -> None:
    port = free_port()
    found = together(caller(port, 0, 2), caller(port, 1, 3))
    assert all("counts 2 processes, process 1 (" in said and said.endswith("counts 3") for said in found), found


def test_a_fingerprint_tells_versions_code_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = fingerprint({"model": {"config": {"hidden_size": 16}}, "seed": 1})
    assert mine == fingerprint({"seed": 1, "model": {"config": {"hidden_size": 16}}})
    assert {"python", "easydel", "jax", "jaxlib", "code of easydel"} <= mine.keys()
    other = fingerprint({"model": {"config": {"hidden_size": 32}}, "seed": 1})
    assert differences(mine, other, "a", "b") == ["model.config.hidden_size: 16 in a, 32 in b"]
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"changed")
    lines = differences(mine, fingerprint({"model": {"config": {"hidden_size": 16}}, "seed": 1}), "a", "b")
    assert lines[-1].startswith("code of easydel: ")
    assert all(line.startswith("code of ") for line in lines)  # of the test runner, too, which is the program here
