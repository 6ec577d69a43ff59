"""Checkpoints that are out of the ordinary but good: they load, with exactly the right numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import easydel
from tests.hub import checkpoint as ck

Arrays = dict[str, np.ndarray]
BF16, EMBED, HEAD = ml_dtypes.bfloat16, "model.embed_tokens.weight", "lm_head.weight"


def plain(dtype: Any) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        ck.write(folder, ck.tensors(dtype=dtype))
        return ck.tensors(dtype=dtype)

    return make


def mixed(folder: Path) -> Arrays:
    kinds = [np.float32, BF16, np.float16]
    want = {name: array.astype(kinds[i % 3]) for i, (name, array) in enumerate(ck.tensors().items())}
    ck.write(folder, want)
    return want


def config(text: str | None = None, **changes: Any) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        ck.write(folder, **changes)
        if text is not None:
            (folder / "config.json").write_text(text, encoding="utf-8")
        return ck.tensors()

    return make


def company(folder: Path) -> Arrays:
    """Files that are nobody's business."""
    ck.write(folder)
    for name in ["notes.txt", "pytorch_model.bin", "tf_model.h5", "model.safetensors.bak", "training_args.bin", ".x"]:
        (folder / name).write_bytes(b"\x80anything")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3, "unheard_of": [1]}')
    ck.write_index(folder, {"x": "gone.safetensors"})  # the single file wins
    return ck.tensors()


def extras(folder: Path) -> Arrays:
    names = ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
    ck.write(folder, ck.tensors() | dict.fromkeys(names, np.ones(2, np.float32)))
    return ck.tensors()


def no_prefix(folder: Path) -> Arrays:
    ck.write(folder, {name.removeprefix("model."): array for name, array in ck.tensors().items()})
    return ck.tensors()


def tied(keep: str) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        arrays = ck.tensors()
        arrays[HEAD] = arrays[EMBED]
        want = {name: array for name, array in arrays.items() if name != HEAD}
        if keep != "both":
            arrays.pop(EMBED if keep == HEAD else HEAD)
        ck.write(folder, arrays, tie_word_embeddings=True)
        return want

    return make


def sharded(folder: Path) -> Arrays:
    folder.mkdir()
    (folder / "teil zwei").mkdir()
    names = ("модель-1", "teil zwei/x.y..model-00007-of-00002")
    ck.write_sharded(folder, ck.tensors(), names)
    return ck.tensors()


def linked(folder: Path) -> Arrays:
    ck.write(folder)
    (folder / ck.SINGLE).rename(folder.parent / "elsewhere.safetensors")
    (folder / ck.SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")
    return ck.tensors()


def cached(folder: Path) -> Arrays:
    """The layout of the Hub's cache: links to blobs whose names say nothing."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    real = folder.parent / "snapshots" / "0123"
    ck.write(real)
    for i, file in enumerate(sorted(real.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../blobs/{i}")
    folder.symlink_to(real)
    return ck.tensors()


def header(change: Callable[[dict], bytes]) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        raw = (ck.write(folder) / ck.SINGLE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        text = change(json.loads(raw[8:end]))
        (folder / ck.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
        return ck.tensors()

    return make


def unaligned(table: dict) -> bytes:
    text = json.dumps(table).encode()
    return text + b" " * (1 - len(text) % 2)  # an odd length


def without_metadata(table: dict) -> bytes:
    del table["__metadata__"]
    return json.dumps(dict(reversed(table.items()))).encode()


def pickled(form: str) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        torch = pytest.importorskip("torch")
        (ck.write(folder) / ck.SINGLE).unlink()
        state = {name: torch.from_numpy(array) for name, array in ck.tensors().items()}
        if form == "strided":
            state = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in state.items()}
        if form != "sharded":
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy")
            return ck.tensors()
        parts = {"one.bin": list(state)[:5], "two.bin": list(state)[5:]}
        for name, names in parts.items():
            torch.save({key: state[key] for key in names}, folder / name)
        weight_map = {key: name for name, names in parts.items() for key in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return ck.tensors()

    return make


GOOD: dict[str, Callable[[Path], Arrays]] = {
    "float32": plain(np.float32),
    "bfloat16": plain(BF16),
    "float16": plain(np.float16),
    "float8": plain(ml_dtypes.float8_e4m3fn),
    "mixed dtypes": mixed,
    "unknown config keys": config(surprise={"a": [1]}, quantum=None, _private="x"),
    "old rope fields": config(rope_theta=10000, rope_scaling=None, torch_dtype="float32"),
    "integers for floats": config(attention_dropout=0, sliding_window=0),
    "config with a byte order of its own": config(json.dumps(ck.CONFIG, indent=7, ensure_ascii=False) + "\n\n"),
    "auto_map of code beside": config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    "other files": company,
    "inverse frequencies": extras,
    "no base-model prefix": no_prefix,
    "tied, under the embedding": tied(EMBED),
    "tied, under the head": tied(HEAD),
    "tied, under both": tied("both"),
    "shards with odd names": sharded,
    "a link to a file": linked,
    "the Hub's cache": cached,
    "empty metadata": header(lambda table: json.dumps(table | {"__metadata__": {}}).encode()),
    "no metadata, tensors in another order": header(without_metadata),
    "unaligned header": header(unaligned),
    "pickle": pickled("zip"),
    "pickle of torch before 1.6": pickled("legacy"),
    "pickle of strided tensors": pickled("strided"),
    "pickle in shards": pickled("sharded"),
}


@pytest.mark.parametrize("case", GOOD)
def test_loads_exactly(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    want = GOOD[case](folder)
    for loader in (easydel.LlamaForCausalLM, easydel.AutoEasyDeLModelForCausalLM):
        ck.assert_equal(loader.from_pretrained(folder), want)


def test_a_backbone_alone(tmp_path: Path) -> None:
    arrays = {n.removeprefix("model."): a for n, a in ck.tensors().items() if n != HEAD}
    ck.write(tmp_path, arrays)
    ck.assert_equal(easydel.LlamaModel.from_pretrained(tmp_path), arrays)
