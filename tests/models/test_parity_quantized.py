"""Every family of the table, quantized by each method: saved and reloaded bit by bit, on one device and on eight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from tests.models.pairs import Pair, close, equal, load_ours, pair
from tests.models.table import cases
from tests.quantization.tiny import logits

MESH = (1, 2, 1, 2, 2)  # splits rows, heads and layers' widths, and the sequence
DEVICES = [pytest.param(None, id="one"), pytest.param(MESH, id="eight", marks=pytest.mark.slow)]
GROUP = 16  # divides some of the tiny widths and not others


def quantized(case: Pair, method: str) -> Any:
    """Return a quantized copy of our model."""
    batches = [case.inputs(case.ids(2, 9, seed=1))] if method == "a8bit" else None
    return nnx.clone(case.ours).quantize(method, group_size=GROUP, calibration=batches)


def sharded(case: Pair, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(axis|axes).*")  # sizes of a tiny model need not divide
        return load_ours(case.family, case.task, folder, sharding_axis_dims=MESH, auto_shard_model=True)


def holds(case: Pair, method: str, dims: tuple[int, ...] | None, folder: Path) -> None:
    model, inputs = quantized(case, method), case.inputs(case.ids(8, 8))
    model.save_pretrained(folder)
    if dims is None:
        again = load_ours(case.family, case.task, folder)
    else:
        again = sharded(case, folder)
        assert again.mesh.size == 8
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(axis|axes).*")
            model.shard_model(mesh=again.mesh)
    assert again.quantization_report.method == method
    got = logits(model, **inputs)
    equal(logits(again, **inputs), got, "reloaded")
    assert abs(got - logits(case.ours, **inputs)).max() > 1e-6 * abs(got).max(), "quantizing changed nothing"


@pytest.mark.proof("nf4")
@pytest.mark.parametrize("dims", DEVICES)
@pytest.mark.parametrize(("family", "variant"), cases("nf4"))
def test_nf4(family: str, variant: str, dims: Any, tmp_path: Path) -> None:
    holds(pair(family, variant), "nf4", dims, tmp_path)


@pytest.mark.slow  # Llama's is quick: tests/quantization/test_files.py
@pytest.mark.proof("8bit")
@pytest.mark.parametrize("dims", DEVICES)
@pytest.mark.parametrize(("family", "variant"), cases("8bit"))
def test_8bit(family: str, variant: str, dims: Any, tmp_path: Path) -> None:
    holds(pair(family, variant), "8bit", dims, tmp_path)


@pytest.mark.slow  # Llama's is quick: tests/quantization/test_files.py
@pytest.mark.proof("a8bit")
@pytest.mark.parametrize("dims", DEVICES)
@pytest.mark.parametrize(("family", "variant"), cases("a8bit"))
def test_a8bit(family: str, variant: str, dims: Any, tmp_path: Path) -> None:
    holds(pair(family, variant), "a8bit", dims, tmp_path)


@pytest.mark.proof("a8q")
@pytest.mark.parametrize("dims", DEVICES)
@pytest.mark.parametrize(("family", "variant"), cases("a8q"))
def test_a8q(family: str, variant: str, dims: Any, tmp_path: Path) -> None:
    holds(pair(family, variant), "a8q", dims, tmp_path)


@pytest.mark.slow  # Llama's is quick: tests/quantization/test_files.py
@pytest.mark.proof("a4q")
@pytest.mark.parametrize("dims", DEVICES)
@pytest.mark.parametrize(("family", "variant"), cases("a4q"))
def test_a4q(family: str, variant: str, dims: Any, tmp_path: Path) -> None:
    holds(pair(family, variant), "a4q", dims, tmp_path)


@pytest.mark.slow
@pytest.mark.proof("quantized_sharding")
@pytest.mark.parametrize(("family", "variant"), cases("quantized_sharding"))
def test_eight_devices_give_what_one_gives(family: str, variant: str, tmp_path: Path) -> None:
    case = pair(family, variant)
    model, inputs = quantized(case, "nf4"), case.inputs(case.ids(8, 8))
    model.save_pretrained(tmp_path)
    close(logits(sharded(case, tmp_path), **inputs), logits(model, **inputs), 1e-5)  # partial sums over devices
