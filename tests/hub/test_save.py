"""Saving: whole or not at all, beside the user's files."""

from __future__ import annotations

import json
import os
import sys
from collections import namedtuple
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub import commit
from easydel.hub.card import model_card
from easydel.hub.load import load_module
from easydel.hub.resolve import resolve_checkpoint
from easydel.hub.save import parse_size, save_module
from easydel.hub.torch import to_torch
from tests.hub.tiny import Causal, cast, same


def models(*seeds: int) -> list[Causal]:
    return [Causal(nnx.Rngs(seed), layers=1) for seed in seeds]


def load(folder: Path) -> Causal:
    return load_module(lambda: Causal(nnx.Rngs(0), layers=1), resolve_checkpoint(folder))


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(("model", "."))}


def test_replacing_between_forms_leaves_nothing_stale(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-extra.safetensors").write_bytes(b"mine too")
    for seed, size in enumerate(["5GB", "1KB", "1KB", "2KB", "5GB", "5GB"]):
        (model,) = models(seed)
        save_module(model, tmp_path, max_shard_size=size, extra_files={"config.json": f'{{"seed": {seed}}}'})
        assert same(load(tmp_path), model)
        assert json.loads((tmp_path / "config.json").read_text()) == {"seed": seed}
        files = weight_files(tmp_path) - {"model-extra.safetensors"}
        if size == "5GB":
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert files == {"model.safetensors.index.json", *index["weight_map"].values()}
            assert index["metadata"]["total_size"] == sum(v.nbytes for v in to_torch(model).values())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model-extra.safetensors").read_bytes() == b"mine too"


def test_first_shards_have_the_usual_names(tmp_path: Path) -> None:
    save_module(models(0)[0], tmp_path, max_shard_size="2KB")
    assert "model-00001-of-00002.safetensors" in weight_files(tmp_path)
    with safe_open(tmp_path / "model-00001-of-00002.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_carries_the_tokenizer_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    for name in ["tokenizer.json", "merges.txt", "additional_chat_templates/rag.jinja", "secret.txt"]:
        (source / name).write_text("theirs")
    (target / "merges.txt").write_text("mine")
    save_module(models(0)[0], target, source_dir=source)
    assert (target / "tokenizer.json").read_text() == "theirs"
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "theirs"
    assert (target / "merges.txt").read_text() == "mine"
    assert not (target / "secret.txt").exists()


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = models(1, 2)
    save_module(old, tmp_path)
    before = sorted(tmp_path.iterdir())
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("easydel.hub.save.shutil.disk_usage", lambda _: usage(10, 0, 10))
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes but the disk has 10 free"):
            save_module(new, tmp_path)
        with pytest.raises(CheckpointError, match="needs"):
            save_module(new, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("easydel.hub.save._write_shard", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_module(new, tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert same(load(tmp_path), old)


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0MB", "5 apples", 0, -3, True, None])
def test_bad_shard_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(size)  # type: ignore[arg-type]


def test_shard_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", " 1.5 kb", 7)] == [5_000_000_000, 1500, 7]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save_module(models(0)[0], tmp_path / "f")
    with pytest.raises(CheckpointError, match="leaves"):
        save_module(models(0)[0], tmp_path, extra_files={"../config.json": "{}"})


class Crash(BaseException):
    """Stands for a process that dies: no handler but `finally` sees it."""


SAME = [pytest.param(size, size, marks=pytest.mark.slow) for size in ("5GB", "1KB")]


@pytest.mark.parametrize(("before", "after"), [("5GB", "1KB"), ("1KB", "5GB"), *SAME])
def test_a_crash_at_every_step_of_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    old, new = models(1, 2)
    seen = set()
    for step in range(40):
        folder = tmp_path / str(step)
        save_module(old, folder, max_shard_size=before, extra_files={"config.json": "old"})
        left = step
        real = {name: getattr(owner, name) for owner, name in [(os, "replace"), (Path, "unlink"), (Path, "rename")]}

        def dying(name: str, real: dict = real) -> object:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    raise Crash
                left -= 1
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying("replace"))
            patch.setattr(Path, "unlink", dying("unlink"))
            patch.setattr(Path, "rename", dying("rename"))
            try:
                save_module(new, folder, max_shard_size=after, extra_files={"config.json": "new"})
                finished = True
            except Crash:
                finished = False
        # without any recovery the weights are already one model or the other
        plain = load_module(lambda: Causal(nnx.Rngs(0), layers=1), folder)
        assert same(plain, old) or same(plain, new)
        got = load(folder)
        which = "old" if same(got, old) else "new"
        assert same(got, new) or which == "old"
        assert (folder / "config.json").read_text() == which
        seen.add(which)
        if finished:
            break
    assert finished
    assert seen == {"old", "new"}


def test_recovery_refuses_to_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, third = models(1, 2, 3)
    save_module(old, tmp_path)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_apply", crash)
        with pytest.raises(Crash):
            save_module(new, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="interrupted"):
        load(tmp_path)
    save_module(third, tmp_path)
    assert same(load(tmp_path), third)
    assert weight_files(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_to_torch(tmp_path: Path, dtype: jnp.dtype) -> None:
    torch = pytest.importorskip("torch")
    model = cast(Causal(nnx.Rngs(1), tied=True), dtype)
    state = to_torch(model)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    kernel = np.asarray(model.model.layers[10].proj.kernel.get_value()).astype(np.float32)
    got = state["model.layers.10.proj.weight"]
    assert got.is_contiguous()
    assert got.dtype == getattr(torch, jnp.dtype(dtype).name)
    np.testing.assert_array_equal(got.float().numpy(), kernel.T)
    got.zero_()
    assert np.asarray(model.model.layers[10].proj.kernel.get_value()).any()


def test_to_torch_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedError, match="without torch"):
        to_torch(models(0)[0])


def test_saving_does_not_leave_host_copies(tmp_path: Path) -> None:
    model = models(0)[0]
    save_module(model, tmp_path)
    assert model.lm_head.kernel.get_value()._npy_value is None
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].shape == (16, 8)


def test_card_names_both_libraries() -> None:
    card = model_card("me/x", model_type="llama", task="causal-lm", class_name="L", parameters=1234, dtype="float32")
    assert card.startswith("---\nlibrary_name: easydel\npipeline_tag: text-generation\n")
    assert "1,234" in card
    assert "from easydel import AutoEasyDeLModelForCausalLM" in card
    assert "from transformers import AutoModelForCausalLM" in card
