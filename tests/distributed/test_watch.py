"""The watch over a run, its processes played by threads: who is missed, when, and what is said."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easydel.distributed import start, watch
from easydel.distributed.link import Link
from easydel.distributed.meeting import Member, Met
from easydel.distributed.verdict import Status, Verdict
from easydel.distributed.watch import Watch

LIMIT = 0.6
MEMBERS = tuple(Member(number, f"node-{number}", 100 + number) for number in range(3))


class Run:
    """Three processes: links from 0 to 1 and to 2; a process that is not watched is played by the test."""

    def __init__(self, *watched: int) -> None:
        self.ends: dict[tuple[int, int], Link] = {}
        self.ended: dict[int, tuple[Verdict, str, float]] = {}
        for number in (1, 2):
            here, there = (Link(one) for one in socket.socketpair(socket.AF_UNIX))
            self.ends[0, number], self.ends[number, 0] = here, there
        self.watches = {number: self._watch(number) for number in watched}

    def _watch(self, number: int) -> Watch:
        links = {other: link for (mine, other), link in self.ends.items() if mine == number}

        def end(verdict: Verdict, text: str) -> None:
            self.ended[number] = (verdict, text, time.monotonic())

        made = Watch(MEMBERS[number], Met(MEMBERS, links, 1, LIMIT), end)
        made.start()
        return made

    def wait(self, *numbers: int) -> None:
        end = time.monotonic() + 5
        while not set(numbers) <= self.ended.keys():
            assert time.monotonic() < end, self.ended
            time.sleep(0.01)

    def close(self) -> None:
        for made in self.watches.values():
            made._failed.set()
        for made in self.watches.values():
            made._thread.join(5)
        for link in self.ends.values():
            link.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(watch, "LAST_WORDS", 0.05)
    monkeypatch.setattr(watch, "OWN_ERROR_WAIT", 0.05)
    monkeypatch.setattr(Link, "__init__", _init(Link.__init__))
    made: list[Run] = []

    def make(*watched: int) -> Run:
        made.append(Run(*watched))
        return made[-1]

    yield make
    for run in made:
        run.close()


def _init(init: Any) -> Any:
    def without_tcp(self: Link, connected: socket.socket) -> None:
        class Plain(socket.socket):
            def setsockopt(self, *_: Any) -> None:
                pass

        init(self, Plain(connected.family, connected.type, connected.proto, connected.detach()))

    return without_tcp


def test_all_is_well_while_all_live(runs: Any) -> None:
    run = runs(0, 1, 2)
    time.sleep(2.5 * LIMIT)
    assert run.ended == {}


def test_one_that_falls_silent_is_given_up_after_the_limit(runs: Any) -> None:
    begun = time.monotonic()
    run = runs(0, 1)  # 2 lives, and says nothing after this
    run.ends[2, 0].send({"kind": "alive", "phase": "computing", "step": 7, "seconds": 0.5, "checkpoints": None})
    run.wait(0, 1)
    verdict, text, ended = run.ended[0]
    assert LIMIT <= ended - begun < 3 * LIMIT + 1
    assert (verdict.member, verdict.status.step) == (MEMBERS[2], 7)
    assert "process 2 of 3 (host node-2, pid 102) has given no sign of life for 0." in text
    assert "it was: at step 7, computing for 0.5 s" in text
    assert run.ended[1][0] == verdict, "the third is told"
    assert "so this one stops, too: process 1 (host node-1, pid 101)" in run.ended[1][1]


def test_one_that_dies_is_missed_at_once(runs: Any) -> None:
    run = runs(0, 1)
    begun = time.monotonic()
    run.ends[2, 0].close()
    run.wait(0, 1)
    assert run.ended[0][2] - begun < LIMIT
    assert all("process 2 of 3 (host node-2, pid 102) has ended without a word" in run.ended[n][1] for n in (0, 1))


def test_the_death_of_process_0_is_noticed_by_all(runs: Any) -> None:
    run = runs(1, 2)
    run.ends[0, 1].close()
    run.ends[0, 2].close()
    run.wait(1, 2)
    assert {run.ended[number][0].member for number in (1, 2)} == {MEMBERS[0]}


def test_one_that_has_left_is_not_missed(runs: Any) -> None:
    run = runs(0, 1)
    run.ends[2, 0].send({"kind": "left"})
    run.ends[2, 0].close()
    run.watches[1].leave()
    time.sleep(2 * LIMIT)
    assert run.ended == {}


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_is_told_to_all_others(runs: Any, number: int) -> None:
    run = runs(0, 1, 2)
    run.watches[number].note("saving", 9, "/somewhere/checkpoints")
    run.watches[number].announce(OSError("no such disk"))
    others = [other for other in range(3) if other != number]
    run.wait(*others)
    for other in others:
        assert (
            f"process {number} of 3 (host node-{number}, pid {100 + number}) stopped with OSError: no such disk"
            in (run.ended[other][1])
        )
        assert "it was: at step 9, saving for " in run.ended[other][1]
    assert number not in run.ended, "it ends by its own error"


def test_the_time_that_a_process_was_stopped_itself_is_not_the_others_silence(
    runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(0, 1)
    run.ends[2, 0].send({"kind": "left"})
    time.sleep(LIMIT / 4)
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 100)  # as if both had slept
    time.sleep(LIMIT / 2)
    assert run.ended == {}


def test_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    def text(checkpoints: Path | None) -> str:
        mine = Status("computing", 5, 0.1, None if checkpoints is None else str(checkpoints))
        return Verdict(MEMBERS[1], "has gone", Status(), 0.2).text(3, MEMBERS[0], mine).splitlines()[-1]

    assert text(None) == "  to go on: start the run again"
    assert text(tmp_path).endswith(f"from its beginning: there is no whole checkpoint in {tmp_path}")
    for name in ("2", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert text(tmp_path).endswith(f"the last whole checkpoint is that of step 10 in {tmp_path}")


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("EASYDEL_PEER_TIMEOUT", limit)
    with pytest.raises(start.DistributedError, match="peer_timeout="):
        start.initialize()
