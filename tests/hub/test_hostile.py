"""Broken and hostile weight files through the public API: one clear error of our own, before anything is built."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

import easydel
from easydel.errors import CheckpointError
from tests.hub import checkpoint as ck
from tests.hub.damage import (
    NORM,
    Break,
    Q,
    config,
    cut_pickle,
    cut_shard,
    field,
    folder_at,
    header,
    index,
    index_text,
    link_to_secret,
    linked_folder,
    overlapping,
    pickle_bomb,
    plan,
    raw,
    refused,
    remove,
    torch_file,
    weights,
    zipped_bomb,
)

HEADERS: dict[str, tuple[Break, str]] = {
    "empty file": (raw(lambda data: b""), "truncated"),
    "five bytes": (raw(lambda data: data[:5]), "truncated"),
    "cut in the header": (raw(lambda data: data[:100]), "truncated"),
    "cut in the last tensor": (raw(lambda data: data[:-3]), "lm_head.*truncated"),
    "bytes too many": (raw(lambda data: data + b"\0"), "belong to none"),
    "header length 2^63": (raw(lambda data: (2**63).to_bytes(8, "little") + data[8:]), "truncated"),
    "header length 0": (raw(lambda data: bytes(8) + data[8:]), "not valid JSON"),
    "header of 40 MB": (raw(lambda data: (40 << 20).to_bytes(8, "little") + bytes(41 << 20)), "claims"),
    "header not JSON": (header(lambda t: b"{'a': 1}"), "not valid JSON"),
    "header a list": (header(lambda t: b"[]"), "expected an object"),
    "header nested deeply": (header(lambda t: b'{"a":' * 90_000), "not valid JSON"),
    "header with NaN": (header(lambda t: json.dumps(t).replace("[0,", "[NaN,", 1).encode()), "data_offsets"),
    "header with a huge number": (header(lambda t: b'{"x": ' + b"9" * 6000 + b"}"), "not valid JSON"),
    "name twice": (header(lambda t: b'{"x": 1, "x": 2}'), "twice"),
    "an unprintable endless name": (header(lambda t: t.update({"\x1b[2J" * 9999: 1})), r"x1b\[2J"),
    "overlap": (header(overlapping), "overlaps"),
    "hole": (header(lambda t: t.pop(Q) and None), "hole"),
    "shape that lies": (field(Q, shape=[8, 9]), f"{Q}.*the header lies"),
    "shape negative": (field(Q, shape=[-8, -8]), f"{Q}.*shape"),
    "shape huge": (field(Q, shape=[2**62, 2**62]), f"{Q}.*lies"),
    "shape beyond 64 bits": (field(Q, shape=[2**70, 0]), f"{Q}.*shape"),
    "shape zero": (field(Q, shape=[0, 8]), f"{Q}.*lies"),
    "offsets reversed": (field(Q, data_offsets=[256, 0]), f"{Q}.*data_offsets"),
    "offsets in floats": (field(Q, data_offsets=[0.0, 256.0]), f"{Q}.*data_offsets"),
    "dtype unknown": (field(Q, dtype="F4_X"), f"{Q}.*F4_X.*not supported"),
    "dtype that lies": (field(Q, dtype="F64"), f"{Q}.*lies"),
    "metadata of numbers": (header(lambda t: t.update({"__metadata__": {"a": 1}})), "__metadata__"),
}

FITS: dict[str, tuple[Break, str]] = {
    "integer weights": (weights(lambda t: t.update({Q: np.ones((8, 8), np.int32)})), f"dtype +{Q} .*int32"),
    "integer weights of float width": (field(Q, dtype="I32"), f"dtype +{Q}"),
    "boolean norm": (weights(lambda t: t.update({NORM: np.ones(8, np.bool_)})), f"dtype +{NORM}"),
    "rank 3": (weights(lambda t: t.update({Q: t[Q][None]})), f"shape +{Q}"),
    "rank 0": (weights(lambda t: t.update({NORM: np.float32(1)[...]})), f"shape +{NORM}"),
    "no values": (weights(lambda t: t.update({Q: t[Q][:0]})), f"shape +{Q}"),
    "transposed": (weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()})), "shape +lm_head"),
    "missing tensor": (weights(lambda t: t.pop(Q)), f"missing +{Q}"),
    "missing head": (weights(lambda t: t.pop("lm_head.weight")), "missing +lm_head.weight"),
    "unexpected tensor": (weights(lambda t: t.update({"model.evil": t[Q]})), r"unexpected +model\.evil"),
    "both prefixes": (weights(lambda t: t.update({"norm.weight": t[NORM] * 2})), r"norm\.weight"),
    "tied, head differs": (weights(lambda t: None, tie_word_embeddings=True), "tie_word_embeddings=False"),
    "no tensors": (weights(lambda t: t.clear()), "missing"),
    "more layers than tensors": (config(num_hidden_layers=3), r"missing +model\.layers\.2\."),
    "fewer layers than tensors": (config(num_hidden_layers=1), r"unexpected +model\.layers\.1\."),
    "no end of layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "another vocabulary": (config(vocab_size=17), r"shape +lm_head.weight"),
    "another width": (config(hidden_size=16), r"shape +model\.norm"),
    "biases the file lacks": (config(attention_bias=True), r"missing +model\.layers\.0\.self_attn\.k_proj\.bias"),
}  # fmt: skip

INDEXES: dict[str, tuple[Break, str]] = {
    "leaves by dots": (index(lambda m, f: m.update({Q: "../a.safetensors"})), f"{Q}.*leaves"),
    "leaves in the middle": (index(lambda m, f: m.update({Q: "x/../../a.safetensors"})), f"{Q}.*leaves"),
    "absolute": (index(lambda m, f: m.update({Q: str(f / "a.safetensors")})), f"{Q}.*absolute"),
    "Windows drive": (index(lambda m, f: m.update({Q: r"C:\a.safetensors"})), f"{Q}.*absolute"),
    "Windows dots": (index(lambda m, f: m.update({Q: r"..\a.safetensors"})), f"{Q}.*leaves"),
    "Windows share": (index(lambda m, f: m.update({Q: r"\\host\c\a.safetensors"})), f"{Q}.*absolute"),
    "folder that is a link": (index(linked_folder), "is a link to"),
    "another suffix": (index(lambda m, f: m.update({Q: "config.json"})), "no .safetensors file name"),
    "a number for a name": (index(lambda m, f: m.update({Q: 7})), "no .safetensors file name"),
    "a zero byte": (index(lambda m, f: m.update({Q: "a\0.safetensors"})), "no name a file can have"),
    "an endless name": (index(lambda m, f: m.update({Q: "a" * 5000 + ".safetensors"})), "no name a file can have"),
    "missing shard": (index(lambda m, f: (f / "b.safetensors").unlink()), r"b\.safetensors +holds \d+ tensors"),
    "shard is a folder": (index(lambda m, f: folder_at("b.safetensors")(f)), r"b\.safetensors .*no such file"),
    "wrong shard": (index(lambda m, f: m.update({Q: "b.safetensors"})), f"missing +{Q} +in b.* in a"),
    "not listed": (index(lambda m, f: m.pop(Q) and None), f"unexpected +{Q}"),
    "listed, in no shard": (index(lambda m, f: m.update({"model.x": "a.safetensors"})), r"missing +model\.x"),
    "broken shard": (index(cut_shard), r"b\.safetensors.*truncated"),
    "empty map": (index(lambda m, f: {}), "non-empty 'weight_map'"),
    "map a list": (index(lambda m, f: [Q]), "non-empty 'weight_map'"),
    "not JSON": (index_text(b"\x00\x01"), "not valid JSON"),
    "a list": (index_text(b"[]"), "weight_map"),
    "twice": (index_text(b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'), "twice"),
    "nested deeply": (index_text(b"[" * 90_000), "not valid JSON"),
}  # fmt: skip

FILES: dict[str, tuple[Break, str]] = {
    "no weights": (remove(ck.SINGLE), "no weights: expected model.safetensors"),
    "weights a folder": (folder_at(ck.SINGLE), "no weights"),
    "weights a pipe": (lambda f: ((f / ck.SINGLE).unlink(), os.mkfifo(f / ck.SINGLE)), "no weights"),
    "weights a broken link": (lambda f: ((f / ck.SINGLE).unlink(), (f / ck.SINGLE).symlink_to("gone")), "no weights"),
    "weights a link to a secret": (link_to_secret, "is a link to"),
    "index a folder": (lambda f: (remove(ck.SINGLE)(f), folder_at(ck.INDEX)(f)), "no weights"),
    "pickle bomb": (pickle_bomb, "refuses"),
    "pickle bomb, zipped": (zipped_bomb(zipfile.ZIP_STORED), "refuses"),
    "pickle bomb, compressed": (zipped_bomb(zipfile.ZIP_DEFLATED), "compressed"),
    "pickle of no tensors": (torch_file(lambda torch: {"a": 1}), "dictionary of tensors"),
    "pickle of a list": (torch_file(lambda torch: [torch.ones(2)]), "dictionary of tensors"),
    "pickle of a sparse tensor": (torch_file(lambda torch: {Q: torch.ones(8, 8).to_sparse()}), "not supported"),
    "pickle of more than it stores": (torch_file(lambda torch: {Q: torch.ones(1).expand(2**40)}), "claims more"),
    "pickle cut": (cut_pickle, "refuses"),
    "plan that writes outside": (plan({"do": "move", "name": "../outside/mine", "was": None}), "not the plan"),
    "plan that removes outside": (plan({"do": "remove", "name": "../outside/mine", "was": [4, 0]}), "not the plan"),
    "plan that is none": (plan("x"), "not the plan"),
}  # fmt: skip

CASES = {
    f"{group}: {name}": case
    for group, table in [("header", HEADERS), ("fit", FITS), ("index", INDEXES), ("files", FILES)]
    for name, case in table.items()
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused(tmp_path: Path, case: str) -> None:
    folder = ck.write(tmp_path / "model")
    damage, words = CASES[case]
    damage(folder)
    refused(folder, words)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "blank", "endless", "zero"])
def test_places_that_hold_no_checkpoint(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    names = {"blank": " ", "endless": str(tmp_path / ("x" * 5000)), "zero": str(tmp_path / "a\0b")}
    words = {"missing": "no such directory", "file": "is a file", "empty": "config.json", "blank": "empty"}
    for loader in (easydel.LlamaForCausalLM, easydel.AutoEasyDeLModelForCausalLM):
        with pytest.raises(CheckpointError, match=words.get(kind, "no such directory")):
            loader.from_pretrained(names.get(kind, tmp_path / kind))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
