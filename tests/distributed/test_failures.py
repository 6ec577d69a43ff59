"""One is stopped, fails, runs out of disk or is asked to leave: what the others do, in time, and what they say."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from easydel.distributed import EXIT_CODE
from easydel.distributed.verdict import whole_steps
from easydel.training.logs import read_log
from tests.distributed import runs
from tests.distributed.forks import Server, result
from tests.distributed.launch import free_port
from tests.distributed.test_kills import wait_for

CONFIG = """
model:
  model_type: llama
  tokenizer: stdlib-4m
  config: {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
    vocab_size: 4096}
data: {train: %s, sequence_length: 16}
training: {output_dir: %s, max_steps: 4, save_steps: 2, save_model: false, batch_size: 2}
logging: {steps: 1, to: [console, jsonl]}
"""
MESH = (1, 2, 1, 1, 1)
FOREVER = 10_000
LIMIT = 3.0
"""Seconds of silence that these tests allow; the default is 60."""
ROOM = 10.0
"""Seconds that the machine of the tests may be late by."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYDEL_PEER_TIMEOUT", str(LIMIT))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_is_stopped_is_given_up_after_the_limit(server: Server, tmp_path: Path, victim: int) -> None:
    out = tmp_path / "out"
    with server.run(runs.train, 2, 1, tmp_path, str(out), MESH, FOREVER, 0.05) as started:
        wait_for(lambda: bool(whole_steps(out / "checkpoints")), started)
        started[victim].send(signal.SIGSTOP)
        stopped = time.monotonic()
        other = started[1 - victim]
        assert other.wait(LIMIT + ROOM) == EXIT_CODE
        seconds = time.monotonic() - stopped
        assert seconds > LIMIT - 0.5  # it is not given up before
        said = other.log.read_text()
        print(f"{seconds:.1f} s\n{said[said.index('easydel:') :]}")
        assert re.search(
            rf"process {victim} of 2 \(host .+, pid {started[victim].pid}\) has given no sign of life", said
        )
        assert "3 s is the limit" in said
        assert re.search(r"it was: at step \d+, \w+", said)
        assert f"in {out / 'checkpoints'}" in said
        started[victim].send(signal.SIGCONT)  # it learns that it was given up, or that the other is gone
        assert started[victim].wait(ROOM) == EXIT_CODE
        assert "easydel: process" in started[victim].log.read_text()


def test_an_error_in_one_ends_all(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with server.run(runs.fail_at, 2, 1, tmp_path, str(out), MESH, FOREVER, 1, 6) as started:
        assert started[1].wait(120) == 1
        failed = time.monotonic()
        assert started[0].wait(ROOM) == EXIT_CODE
        print(f"{time.monotonic() - failed:.1f} s after the one that failed")
        assert "OSError: /nowhere/data.txt: the disk has gone" in started[1].log.read_text()
        said = started[0].log.read_text()
    print(said[said.index("easydel:") :])
    assert re.search(r"process 1 of 2 \(host .+\) stopped with OSError: /nowhere/data.txt: the disk has gone", said)
    assert "it was: at step 6, " in said
    assert f"the last whole checkpoint is that of step 4 in {out / 'checkpoints'}" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a disk that can be filled has to be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_all_and_leaves_the_checkpoint_before(
    server: Server, tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    with server.run(runs.fill_the_disk, 2, 1, tmp_path, str(out), MESH, FOREVER, 6) as started:
        codes = [one.wait(120) for one in started]
        logs = [one.log.read_text() for one in started]
    assert set(codes) <= {1, EXIT_CODE}
    assert 1 in codes
    told = (
        rf"{out}/checkpoints/8: the checkpoint could not be written: No space left on device. This process writes about"
    )
    for code, log in zip(codes, logs, strict=True):
        assert re.search(told + r" [\d,]+ bytes of it; \d+ are free", log), log
        if code == EXIT_CODE:
            print(log[log.index("easydel:") :])
            assert re.search(r"easydel: process \d of 2 \(host .+\) stopped with CheckpointError: ", log)
    (small_disk / "filler").unlink()
    with server.run(runs.train, 1, 1, tmp_path / "again", str(out), (1, 1, 1, 1, 1), 12) as started:
        assert started[0].wait(120) == 0
    assert result(tmp_path / "again", 0) == {"from": 4, "reason": "max_steps", "step": 12}


@pytest.mark.slow
def test_a_scheduler_that_asks_one_to_leave_gets_all_to_save_at_the_same_step(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with server.run(runs.train, 2, 1, tmp_path, str(out), MESH, FOREVER, 0.05) as started:
        wait_for(lambda: bool(whole_steps(out / "checkpoints")), started)
        started[1].send(signal.SIGTERM)
        assert [one.wait(60) for one in started] == [0, 0], started[0].log.read_text()
    first, second = (result(tmp_path, number) for number in range(2))
    assert first == second
    assert first["reason"] == "SIGTERM"
    assert whole_steps(out / "checkpoints")[-1] == first["step"]


def test_processes_that_do_not_fit_together_do_not_begin(server: Server, tmp_path: Path) -> None:
    port, begun = free_port(), time.monotonic()
    first = server.run(runs.join_as, 1, 1, tmp_path / "0", port, 0, "0.1.0", {"optimizer": {"learning_rate": 0.1}})
    second = server.run(runs.join_as, 1, 1, tmp_path / "1", port, 1, "0.2.0", {"optimizer": {"learning_rate": 0.2}})
    with first as [one], second as [other]:
        assert [one.wait(20), other.wait(20)] == [1, 1]
        print(f"{time.monotonic() - begun:.1f} s")
        for process in (one, other):
            said = process.log.read_text()
            assert re.search(r"DistributedError: process 0 \(.+\) and process 1 \(.+\) do not fit together", said)
            assert re.search(r"\n  easydel: 0.1.0 in process 0 \(.+\), 0.2.0 in process 1 \(", said)
            assert re.search(r"\n  optimizer.learning_rate: 0.1 in process 0 \(.+\), 0.2 in process 1 \(", said)
    print(said[said.rindex("easydel.errors") :])


@pytest.mark.slow
def test_the_command_trains_in_two_processes_and_goes_on_in_one(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n" * 200)
    file, out, port = tmp_path / "run.yaml", tmp_path / "out", free_port()
    file.write_text(CONFIG % (tmp_path / "a.txt", out))
    both = ["train", str(file), "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    first = server.run(
        runs.command, 1, 1, tmp_path / "0", [*both, "--process-id", "0", "--set", "training.max_steps=2"]
    )
    second = server.run(
        runs.command, 1, 1, tmp_path / "1", [*both, "--process-id", "1", "--set", "training.max_steps=2"]
    )
    with first as [one], second as [other]:
        assert [one.wait(120), other.wait(120)] == [0, 0], one.log.read_text() + other.log.read_text()
        said = one.log.read_text()
        assert "mesh: dp=1, fsdp=2" in said
        assert "step 2/2  loss" in said
        assert "loss" not in other.log.read_text(), "process 0 speaks for both"
    with server.run(runs.command, 1, 1, tmp_path / "2", ["train", str(file)]) as [alone]:
        assert alone.wait(120) == 0, alone.log.read_text()
        assert "going on from step 2" in alone.log.read_text()
    assert [record["step"] for record in read_log(out / "log.jsonl")] == [1, 2, 3, 4]
