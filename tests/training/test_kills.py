"""A run that is killed with SIGKILL at random moments ends, bit for bit, as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.killed_run import STEPS

ROOT = Path(__file__).parents[2]


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.training.killed_run", str(folder), str(cache)]
    # one device, and as quickly compiled as here
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen[str]) -> None:
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors


def seen(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "seen.txt").read_text().splitlines() if (folder / "seen.txt").exists() else []
    return [(int(number), digest) for number, digest in (line.split() for line in lines)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    finish(start(folder, compiled))
    first = time.monotonic() - began
    return folder, first


@pytest.mark.slow  # ../distributed/test_kills.py kills runs of several processes, test_trainer.py in its own process
@pytest.mark.parametrize("kills", [1, 20])
def test_killed_again_and_again(whole, compiled, tmp_path, kills):
    moments = random.Random(kills)
    done = 0
    while done < kills:
        run = start(tmp_path, compiled)
        # Some die while they start or resume, some in a step, some while a checkpoint is written.
        wanted = moments.choice([None, *range(1, 6)])
        before = len(seen(tmp_path))
        while run.poll() is None:
            if wanted is None or len(seen(tmp_path)) - before >= wanted:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 3.0 if wanted is None else 0.1))
        if run.poll() is not None:  # it got to its end first
            assert run.returncode == 0, run.communicate()[1]
            break
        run.send_signal(signal.SIGKILL)
        run.communicate()
        done += 1
    assert done == kills, f"the run ended after {done} kills: make it longer"
    finish(start(tmp_path, compiled))
    assert (tmp_path / "digest.txt").read_text() == (whole[0] / "digest.txt").read_text()
    expected = dict(seen(whole[0]))
    assert sorted(expected) == list(range(STEPS))
    got = seen(tmp_path)
    assert {number for number, _ in got} == set(expected)  # none skipped
    assert all(expected[number] == digest for number, digest in got)  # a step repeated sees the same batch


@pytest.mark.slow  # test_trainer.py sends signals to a run in its own process
def test_sigterm_saves_and_leaves_with_success(whole, compiled, tmp_path):
    run = start(tmp_path, compiled)
    while len(seen(tmp_path)) < 5:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    finish(run)
    number = int((tmp_path / "digest.txt").read_text().split()[0])
    assert 5 <= number < STEPS
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())[-1] == number
    finish(start(tmp_path, compiled))
    assert (tmp_path / "digest.txt").read_text() == (whole[0] / "digest.txt").read_text()
    assert [number for number, _ in seen(tmp_path)] == list(range(STEPS))  # nothing was done twice
