"""Every family of the table: weights out and back in, here and in transformers, and on eight devices."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from easydel.paths import flatten
from tests.models.inputs import as_torch
from tests.models.pairs import Jitted, Pair, array, build_hf, close, equal, load_hf, load_ours, pair
from tests.models.table import FAMILIES, cases

SENSITIVE = ("deepseek_v3", "falcon_mamba", "jamba")
"""In which for some inputs a rounding to bfloat16 decides between experts, or is divided by something small."""
MESHES = [(1, 8, 1, 1, 1), (2, 2, 1, 2, 1), (1, 2, 1, 4, 1), (1, 2, 1, 1, 4)]


@pytest.mark.proof("to_torch")
@pytest.mark.parametrize(("family", "variant"), cases("to_torch"))
def test_to_torch_loads_strictly(family: str, variant: str) -> None:
    case = pair(family, variant)
    other = build_hf(case.family, case.task, {**case.family.config, **case.variant.config}, seed=1)
    other.load_state_dict(case.ours.to_torch(), strict=True)
    for name, tensor in case.hf.state_dict().items():
        equal(other.state_dict()[name], tensor, name)


@pytest.mark.proof("files")
@pytest.mark.parametrize("size", ["5GB", "8KB"])
@pytest.mark.parametrize(("family", "variant"), cases("files"))
def test_saved_here_loads_there_and_here(family: str, variant: str, size: str, tmp_path: Path) -> None:
    case = pair(family, variant)
    case.ours.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
    hf, again = load_hf(case.family, case.task, tmp_path), load_ours(case.family, case.task, tmp_path)
    for name, tensor in case.hf.state_dict().items():
        equal(hf.state_dict()[name], tensor, name)
    inputs = as_torch(case.inputs(case.ids(2, 9)))
    with torch.no_grad():
        equal(hf(**inputs).logits, case.hf(**inputs).logits, "logits")
    identical(case.ours, again)
    assert again.config == case.ours.config
    assert not set(type(again.config).runtime_fields) & set(json.loads((tmp_path / "config.json").read_text()))


def identical(one: object, two: object) -> None:
    left, right = flatten(one.params), flatten(two.params)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        equal(left[path], right[path], path)


@pytest.mark.proof("bfloat16")
@pytest.mark.parametrize(("family", "variant"), cases("bfloat16"))
def test_bfloat16(family: str, variant: str, tmp_path: Path) -> None:
    case = pair(family, variant)
    half = load_ours(case.family, case.task, case.folder, dtype="bfloat16")
    half.save_pretrained(tmp_path)
    again = load_ours(case.family, case.task, tmp_path)
    identical(half, again)
    hf = load_hf(case.family, case.task, tmp_path)
    assert hf.dtype == torch.bfloat16
    buffers = dict(case.hf.named_buffers())
    for name, tensor in case.hf.state_dict().items():
        kept = hf.state_dict()[name]  # some are float32 there whatever the file holds; a buffer is so in the file, too
        equal(kept, (tensor if name in buffers else tensor.bfloat16()).to(kept.dtype), name)
    got, want = closest(case, Jitted(again), hf)
    assert str(got.dtype) == "bfloat16"
    close(got, want, 0.05)  # a few units of bfloat16's 1/256 after two layers


def closest(case: Pair, ours: Jitted, theirs: Any) -> tuple[Any, torch.Tensor]:
    """Return both logits; for sensitive families, of the one of four inputs for which they are closest."""
    found = []
    for seed in range(4 if case.family.name in SENSITIVE else 1):
        inputs = case.inputs(case.ids(2, 9, seed))
        with torch.no_grad():
            got, want = ours(**inputs).logits, theirs(**as_torch(inputs)).logits
        found.append((np.abs(array(got) - array(want)).max() / np.abs(array(want)).max(), seed, got, want))
    return min(found)[2:]


def meshes() -> list[Any]:
    """Return every mesh for a main variant, all but one of them slow, and the one that splits most for other variants.

    Families take turns, so that every run has each mesh with every fourth family.
    """
    turns = {family: n % len(MESHES) for n, family in enumerate(FAMILIES)}
    return [
        pytest.param(family, variant, dims, marks=[pytest.mark.slow] if main and turn != turns[family] else [])
        for family, variant in cases("sharding")
        for main in [variant == FAMILIES[family].main.name]
        for turn, dims in enumerate(MESHES)
        if main or turn == 2
    ]


@pytest.mark.proof("sharding")
@pytest.mark.parametrize(("family", "variant", "dims"), meshes())
def test_sharded_equals_unsharded(family: str, variant: str, dims: tuple[int, ...]) -> None:
    case = pair(family, variant)
    inputs = case.labelled(case.ids(8, 16))
    want, want_gradients = case.run.step(**inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(axis|axes).*")  # sizes of a tiny model need not divide
        sharded = load_ours(case.family, case.task, case.folder, sharding_axis_dims=dims, auto_shard_model=True)
    assert sharded.is_sharded
    assert sharded.mesh.size == 8
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded.params))
    out, gradients = Jitted(sharded).step(**inputs)
    close(out.logits, want.logits, 1e-5, "logits")
    close(out.loss, want.loss, 1e-5, "loss")
    wanted = flatten(want_gradients)
    largest = max(np.abs(array(g)).max() for g in wanted.values())
    for path, gradient in flatten(gradients).items():
        # A key's bias' beside its kernel's, too: where keys are not rotated it cancels, and what is left is rounding.
        beside = wanted[path.replace("k_proj/bias", "k_proj/kernel")]
        least = max(1e-3 * largest, np.abs(array(beside)).max())
        close(gradient, wanted[path], 1e-4, path, least=least)  # sums over devices, backwards too
