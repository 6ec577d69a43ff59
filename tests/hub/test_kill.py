"""SIGKILL at random moments of `save_pretrained`: what is there is the old or the new model, whole."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import easydel
from tests.hub import checkpoint as ck
from tests.hub.killer import WHOLE

SIZES = ("5GB", "1KB")  # a single file, many shards
MINE = {"notes.txt": "mine", "model-of-mine.safetensors": "mine too", "sub/data.json": "{}"}


@pytest.fixture(scope="module")
def killer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.killer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def save(killer: subprocess.Popen[str], folder: Path, number: int, size: str, fraction: float) -> str:
    print(folder, number, size, fraction, file=killer.stdin, flush=True)
    answer = killer.stdout.readline().strip()
    assert answer in ("killed", "finished")
    return answer


def read_plainly(folder: Path) -> dict[str, np.ndarray]:
    """Read as a program would that knows the format and nothing of us (the order is transformers')."""
    if (folder / ck.SINGLE).exists():
        return load_file(folder / ck.SINGLE)
    weight_map = json.loads((folder / ck.INDEX).read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def which(arrays: dict[str, np.ndarray]) -> int:
    """Return the number of the model that these are, every one of them."""
    fits = [
        number for number in range(2)
        if arrays.keys() == (want := ck.tensors(number)).keys()
        and all(np.array_equal(arrays[name], want[name]) for name in want)
    ]  # fmt: skip
    assert len(fits) == 1, "neither the old nor the new model"
    return fits[0]


def kill_often(killer: subprocess.Popen[str], folder: Path, kills: int, seed: int) -> Counter:
    """Kill that many saves; check after each; return what was seen."""
    for name, text in MINE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    draw, seen, here = random.Random(seed), Counter(), 0
    save(killer, folder, here, SIZES[0], WHOLE)
    while seen["killed"] < kills:
        end = save(killer, folder, 1 - here, draw.choice(SIZES), draw.uniform(0.0, 1.1))
        plain = which(read_plainly(folder))
        pending = any(folder.glob(".easydel-commit-*"))
        model = easydel.LlamaForCausalLM.from_pretrained(folder)
        number = which(ck.loaded(model))
        assert model.config.eos_token_id == number + 1, "config and weights belong together"
        assert number == plain or pending
        assert end == "killed" or number == 1 - here
        assert {name: (folder / name).read_text() for name in MINE} == MINE
        seen.update([end, f"{end}: {'old' if number == here else 'new'}", *(["completed"] if pending else [])])
        here = number
    save(killer, folder, 1 - here, SIZES[0], WHOLE)
    assert which(read_plainly(folder)) == 1 - here
    left = {path.name for path in folder.iterdir()}
    assert left == {ck.SINGLE, "config.json", "generation_config.json", "notes.txt", "model-of-mine.safetensors", "sub"}
    return seen


def test_a_few_kills(killer: subprocess.Popen[str], tmp_path: Path) -> None:
    kill_often(killer, tmp_path, 6, seed=0)


@pytest.mark.slow
def test_a_hundred_kills(killer: subprocess.Popen[str], tmp_path: Path) -> None:
    seen = kill_often(killer, tmp_path, 100, seed=1)
    print(dict(seen))
    assert seen["killed: old"]  # both sides of the commit point were hit; how often depends on the machine's speed
    assert seen["killed: new"]


def test_transformers_reads_what_a_kill_left(killer: subprocess.Popen[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    save(killer, tmp_path, 0, "1KB", WHOLE)
    while save(killer, tmp_path, 1, "1KB", 0.7) == "finished":
        save(killer, tmp_path, 0, "1KB", WHOLE)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    which({name: tensor.numpy() for name, tensor in model.state_dict().items()})
