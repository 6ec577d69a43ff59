"""Ways to damage the checkpoint of `checkpoint.py`, and what must come of it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import easydel
from easydel.errors import CheckpointError, EasyDeLError, UnsupportedError
from tests.hub import checkpoint as ck

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
MARKER = "ran"  # a file that code of a checkpoint would write, had it run
Break = Callable[[Path], Any]


def header(edit: Callable[[dict], Any], data: Callable[[bytes], bytes] = lambda data: data) -> Break:
    """Return what rewrites the header (and the data) of the single file."""

    def change(folder: Path) -> None:
        raw = (folder / ck.SINGLE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:end])
        text = edit(table)
        text = json.dumps(table).encode() if text is None else text
        (folder / ck.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data(raw[end:]))

    return change


def field(name: str, **values: Any) -> Break:
    """Return what changes fields of one tensor's header entry."""
    return header(lambda table: table[name].update(values))


def raw(edit: Callable[[bytes], bytes], name: str = ck.SINGLE) -> Break:
    """Return what rewrites a whole file."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def weights(edit: Callable[[dict[str, np.ndarray]], Any], **config: Any) -> Break:
    """Return what writes other tensors (under a true header) and another config."""

    def change(folder: Path) -> None:
        arrays = ck.tensors()
        edit(arrays)
        ck.write(folder, arrays, **config)

    return change


def index(edit: Callable[[dict[str, str], Path], Any]) -> Break:
    """Return what shards the checkpoint and edits the index's weight map."""

    def change(folder: Path) -> None:
        weight_map = ck.write_sharded(folder, ck.tensors())
        result = edit(weight_map, folder)
        ck.write_index(folder, weight_map if result is None else result)

    return change


def index_text(text: bytes) -> Break:
    def change(folder: Path) -> None:
        ck.write_sharded(folder, ck.tensors())
        (folder / ck.INDEX).write_bytes(text)

    return change


def config(**changes: Any) -> Break:
    return lambda folder: ck.write_config(folder, **changes)


def config_text(text: bytes) -> Break:
    return lambda folder: (folder / "config.json").write_bytes(text)


def rope(kind: str, **fields: Any) -> Break:
    return config(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **fields})


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def folder_at(name: str) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def outside(folder: Path) -> Path:
    other = folder.parent / "outside"
    other.mkdir(exist_ok=True)
    return other


def linked_folder(weight_map: dict[str, str], folder: Path) -> None:
    (folder / "a.safetensors").rename(outside(folder) / "a.safetensors")
    (folder / "link").symlink_to(outside(folder))
    weight_map |= {name: "link/a.safetensors" for name, file in weight_map.items() if file == "a.safetensors"}


def link_to_secret(folder: Path) -> None:
    (outside(folder) / "secret.txt").write_bytes((folder / ck.SINGLE).read_bytes())
    (folder / ck.SINGLE).unlink()
    (folder / ck.SINGLE).symlink_to(outside(folder) / "secret.txt")


def cut_shard(weight_map: dict[str, str], folder: Path) -> None:
    raw(lambda data: data[:-1], "b.safetensors")(folder)


class Bomb:
    """Writes a marker when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.target,))


def pickle_bomb(folder: Path) -> None:
    (folder / ck.SINGLE).unlink()
    bomb = pickle.dumps({Q: Bomb(folder / MARKER)}, protocol=2)
    (folder / "pytorch_model.bin").write_bytes(bomb)


def zipped_bomb(compression: int) -> Break:
    def change(folder: Path) -> None:
        (folder / ck.SINGLE).unlink()
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({Q: Bomb(folder / MARKER)}, protocol=2))
            archive.writestr("archive/version", "3\n")

    return change


def torch_file(make: Callable[[Any], Any]) -> Break:
    def change(folder: Path) -> None:
        torch = pytest.importorskip("torch")
        (folder / ck.SINGLE).unlink()
        torch.save(make(torch), folder / "pytorch_model.bin")

    return change


def cut_pickle(folder: Path) -> None:
    torch_file(lambda torch: {Q: torch.ones(8, 8)})(folder)
    raw(lambda data: data[: len(data) // 2], "pytorch_model.bin")(folder)


def remote_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w').close()\nclass Evil: pass\n")
    (folder / "configuration_evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w').close()\nclass Evil: pass\n")
    code = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    ck.write_config(folder, model_type="evil", auto_map=code, trust_remote_code=True)


def plan(*steps: Any) -> Break:
    """Return what leaves the plan of a save that was never ours."""

    def change(folder: Path) -> None:
        (folder / ".easydel-commit-0").mkdir()
        (folder / ".easydel-commit-0" / "x").write_text("new")
        (outside(folder) / "mine").write_text("mine")
        (folder / ".easydel-commit-0" / "plan.json").write_text(json.dumps(list(steps)))

    return change


def overlapping(table: dict) -> None:
    start, stop = table[Q]["data_offsets"]
    table["model.layers.1.self_attn.q_proj.weight"]["data_offsets"] = [start, stop]


def refused(folder: Path, words: str) -> None:
    """Check that both loaders raise an error of ours that names the file, build nothing and touch nothing."""
    before, live = ck.state_of(folder.parent), ck.live_bytes()
    for loader in (easydel.LlamaForCausalLM, easydel.AutoEasyDeLModelForCausalLM):
        with pytest.raises(EasyDeLError) as caught:
            loader.from_pretrained(folder)
        text = str(caught.value)
        assert isinstance(caught.value, CheckpointError | UnsupportedError)
        caught.match(f"(?s){words}")
        assert str(folder) in text, "the error names the file"
        assert len(text) < 10_000
        assert text.replace("\n", "").isprintable()
        assert ck.live_bytes() == live, "nothing was built"
    assert ck.state_of(folder.parent) == before, "nothing was left behind, changed or run"
