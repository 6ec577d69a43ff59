"""SIGKILL to any process at any moment: the others say who, and the run ends as one that nobody killed.

Each part of the run has other processes and another mesh than the one before.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from easydel.distributed import EXIT_CODE
from easydel.distributed.verdict import whole_steps
from tests.distributed import runs
from tests.distributed.forks import Forked, Server
from tests.distributed.uninterrupted import Part, final_arrays, saved_arrays

PLACES = (
    Part(2, 2, (1, 4, 1, 1, 1)),
    Part(4, 1, (2, 2, 1, 1, 1)),
    Part(2, 1, (1, 2, 1, 1, 1)),
    Part(2, 2, (2, 1, 1, 2, 1)),
    Part(1, 2, (1, 2, 1, 1, 1)),
)
SECONDS = 15.0
"""Within which the others must have stopped: about one (what process 0 waits for its last words to be heard) on an
idle machine."""
WAIT = 20
"""Seconds within which all must have met."""
# Sums over devices are added up in another order by processes than within one.
TOLERANCE = dict(rtol=2e-5, atol=2e-6)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYDEL_WAIT", str(WAIT))


def wait_for(seen: Callable[[], bool], started: list[Forked], limit: float = 120) -> None:
    """Wait until something is seen, or a process has ended."""
    end = time.monotonic() + limit
    while not seen() and all(one.poll() is None for one in started):
        assert time.monotonic() < end, started[0].log.read_text()[-2000:]
        time.sleep(0.005)


def kill_some_time(server: Server, draw: random.Random, part: Part, folder: Path, steps: int, log: Path) -> str | None:
    """Start the run again on other processes and kill one of them; return where it was, `None` if it was done."""
    checkpoints, moment = folder / "checkpoints", draw.choice(["start", "step", "step", "save", "save"])
    before = whole_steps(checkpoints)
    victim = draw.randrange(part.processes)
    with server.run(runs.train, part.processes, part.devices, log, str(folder), part.dims, steps, 0.03) as started:
        if moment == "start":
            time.sleep(draw.uniform(0.0, 3.0))
        else:
            wait_for(lambda: whole_steps(checkpoints)[-1:] > before[-1:], started)
            time.sleep(draw.uniform(0.0, 0.2))
        if moment == "save":
            wait_for(lambda: any("tmp" in path.name for path in checkpoints.iterdir()), started)
        if any(one.poll() is not None for one in started):
            assert [one.wait(30) for one in started] == [0] * part.processes
            return None
        killed = time.monotonic()
        started[victim].send(signal.SIGKILL)
        for number, one in enumerate(started):
            code = one.wait(SECONDS + (WAIT if moment == "start" else 0))
            if moment == "start" and code == 1:  # they had not all met: there the others wait for another to come
                said = one.log.read_text()
                assert re.search(rf"did not come to .+ within {WAIT} s|did not reach process 0 at", said), said
                continue
            assert code == (-signal.SIGKILL if number == victim else EXIT_CODE), one.log.read_text()
        print(
            f"{moment}: process {victim} of {part.processes} killed, all gone after {time.monotonic() - killed:.1f} s"
        )
        for number, one in enumerate(started):
            if number != victim and one.wait(1) == EXIT_CODE:
                said = one.log.read_text()
                assert f"process {victim} of {part.processes} (host " in said
                assert "has ended without a word" in said
                if moment != "start":
                    assert re.search(r"it was: at step \d+, \w+", said)
                    step = re.search(r"the last whole checkpoint is that of step (\d+) in", said)
                    # One that process 0 was just putting in its place may have come to be whole meanwhile.
                    assert step is not None
                    assert int(step[1]) in whole_steps(checkpoints)
    return moment


def kill_often(server: Server, tmp_path: Path, places: Sequence[Part], kills: int, steps: int, seed: int) -> None:
    draw, folder, parts, moments = random.Random(seed), tmp_path / "out", [], []
    for number in range(kills + 1):
        part = places[number % len(places)]
        if number == kills:
            done = server.run(
                runs.train, part.processes, part.devices, tmp_path / "last", str(folder), part.dims, steps
            )
            with done as started:
                assert [one.wait(120) for one in started] == [0] * part.processes, started[0].log.read_text()
            parts.append(replace(part, until=steps))
            continue
        moment = kill_some_time(server, draw, part, folder, steps, tmp_path / str(number))
        assert moment is not None, f"the run was over after {len(moments)} kills: give it more steps"
        moments.append(moment)
        # What was saved last is where the next part begins; what came after it is lost, and done again.
        parts.append(replace(part, until=(whole_steps(folder / "checkpoints") or [0])[-1]))
    print(moments, [part.until for part in parts])
    wanted = final_arrays(parts, steps)
    got = saved_arrays(folder / "checkpoints", steps, wanted)
    assert got.keys() == wanted.keys()
    largest = max(float(np.abs(got[name].astype(float) - wanted[name]).max()) for name in wanted)
    print(f"largest difference of the final arrays: {largest:.1e}")
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, **TOLERANCE, err_msg=name)


def test_two_kills(server: Server, tmp_path: Path) -> None:
    kill_often(server, tmp_path, PLACES[2:], kills=2, steps=24, seed=1)


@pytest.mark.slow
def test_ten_kills(server: Server, tmp_path: Path) -> None:
    kill_often(server, tmp_path, PLACES, kills=10, steps=80, seed=1)
