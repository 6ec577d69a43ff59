"""The safetensors reader: right values from good files, one clear error from every bad one."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from easydel.errors import CheckpointError
from easydel.hub.resolve import checkpoint_table, resolve_checkpoint
from easydel.hub.safetensors import DTYPES, TensorEntry, header_bytes, read_header


def write(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8]
    kinds += [np.uint64, np.uint32, np.uint16, np.uint8, np.bool_]
    want = {f"t{i}": (rng.standard_normal((3, i + 1, 2)) * 3).astype(kind) for i, kind in enumerate(kinds)}
    want |= {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)}
    save_file(want, tmp_path / "model.safetensors")
    table = checkpoint_table(tmp_path)
    assert table.keys() == want.keys()
    for name, array in want.items():
        got = table[name].read()
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()
        assert got.dtype == np.bool_ or not got.size or got.ctypes.data % 64 == 0


@pytest.mark.parametrize("index", [(slice(1, 3), slice(0, 5)), (slice(0, 7), slice(2, 4)), (slice(7, 7), slice(0, 5))])
def test_reads_blocks(tmp_path: Path, index: tuple[slice, ...]) -> None:
    want = np.arange(35, dtype=np.float32).reshape(7, 5)
    save_file({"pad": np.zeros(3, np.int8), "a": want}, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(read_header(tmp_path / "m.safetensors")["a"].read(index), want[index])


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_own_writer_matches_torch_reader(tmp_path: Path, kind: str) -> None:
    torch_io = pytest.importorskip("safetensors.torch")
    array = np.linspace(-2, 2, 12).astype(DTYPES[kind]).reshape(3, 4)
    file = tmp_path / "m.safetensors"
    file.write_bytes(header_bytes({"x": (array.dtype, array.shape)}, {"format": "pt"}) + array.tobytes())
    np.testing.assert_array_equal(torch_io.load_file(file)["x"].float().numpy(), array.astype(np.float32))


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


HOSTILE = {
    "unknown dtype": (one("F99"), 8, "F99"),
    "4 bit": (one("F4"), 8, "not supported"),
    "dtype no string": (one(7), 8, "dtype"),
    "negative shape": (one(shape=[-2]), 8, "shape"),
    "float shape": (one(shape=[2.0]), 8, "shape"),
    "boolean shape": (one(shape=[True, 2]), 8, "shape"),
    "huge shape": (one(shape=[2**62, 2**62]), 8, "header lies"),
    "overflowing number": (one(shape=[2**70]), 8, "shape"),
    "shape and bytes differ": (one(shape=[3]), 8, "takes 12 bytes"),
    "offsets reversed": (one(offsets=[8, 0]), 8, "data_offsets"),
    "three offsets": (one(offsets=[0, 4, 8]), 8, "data_offsets"),
    "truncated": (one(), 7, "truncated"),
    "trailing bytes": (one(), 9, "belong to none"),
    "starts late": (one(offsets=[4, 12]), 12, "hole"),
    "overlap": (one() | {"y": one(offsets=[4, 12])["x"]}, 12, "overlaps"),
    "hole": (one() | {"y": one(offsets=[12, 20])["x"]}, 20, "hole"),
    "extra field": (one(surprise=1), 8, "exactly the fields"),
    "entry no object": ({"x": [1]}, 8, "exactly the fields"),
    "header a list": ([1], 0, "expected an object"),
    "metadata not strings": (one() | {"__metadata__": {"a": 1}}, 8, "__metadata__"),
    "not JSON": (b"{oops", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not valid JSON"),
    "nested too deeply": (b"[" * 100_000, 0, "not valid JSON"),
    "duplicate tensor": (b'{"x": 1, "x": 2}', 0, "twice"),
    "duplicate field": (b'{"x": {"dtype": "F32", "dtype": "F16"}}', 0, "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    header, size, words = HOSTILE[case]
    file = write(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint_table(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**33, 100])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    write(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint_table(tmp_path)


def test_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones(4, np.float32)}, file)
    entry: TensorEntry = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="replaced"):
        entry.read()


def sharded(folder: Path, weight_map: object, **shards: dict[str, np.ndarray]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


A, B, ONE = "a.safetensors", "b.safetensors", np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("weight_map", "shards", "words"),
    [
        ({"x": "../a.safetensors"}, {}, "leaves the checkpoint"),
        ({"x": "/etc/a.safetensors"}, {}, "absolute"),
        ({"x": "C:\\a.safetensors"}, {}, "absolute"),
        ({"x": "..\\a.safetensors"}, {}, "leaves"),
        ({"x": "passwd"}, {}, "no .safetensors"),
        ({"x": 3}, {}, "no .safetensors"),
        ({}, {}, "non-empty"),
        ([1], {}, "weight_map"),
        ({"x": A, "y": B}, {"a": {"x": ONE}}, r"file +b\.safetensors +holds 1 tensors +no such file"),
        ({"x": A, "y": A}, {"a": {"x": ONE}}, r"missing +y"),
        ({"x": A, "y": A}, {"a": {"x": ONE}, "b": {"y": ONE}}, r"missing +y"),
        ({"x": A}, {"a": {"x": ONE, "z": ONE}}, r"unexpected +z"),
        ({"x": A, "y": B}, {"a": {"x": ONE, "y": ONE}, "b": {"y": ONE}}, r"duplicate +y"),
    ],
)
def test_hostile_indexes(tmp_path: Path, weight_map: object, shards: dict, words: str) -> None:
    sharded(tmp_path, weight_map, **shards)
    with pytest.raises(CheckpointError, match=words):
        checkpoint_table(tmp_path)


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    sharded(tmp_path, {}, a={"x": ONE})
    text = '{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="twice"):
        checkpoint_table(tmp_path)


def test_disagreements_are_reported_together(tmp_path: Path) -> None:
    sharded(tmp_path, {"x": A, "gone": A}, a={"x": ONE, "extra": ONE})
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*gone.*extra"):
        checkpoint_table(tmp_path)


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    sharded(tmp_path, {"x": A}, a={"x": ONE}, model={"x": ONE * 2})
    np.testing.assert_array_equal(checkpoint_table(tmp_path)["x"].read(), ONE * 2)


def test_pickled_weights_are_the_last_resort(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    want = {"x": torch.arange(6.0).reshape(2, 3), "h": torch.ones(3, dtype=torch.bfloat16) * 1.5}
    torch.save(want, tmp_path / "pytorch_model.bin")
    table = checkpoint_table(tmp_path)
    np.testing.assert_array_equal(table["x"].read((slice(0, 2), slice(1, 3))), want["x"].numpy()[:, 1:])
    np.testing.assert_array_equal(table["h"].read(), np.full(3, 1.5, ml_dtypes.bfloat16))


def test_pickled_code_never_runs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": Path("harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refuses"):
        checkpoint_table(tmp_path)


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for name, words in [
        (tmp_path / "f", "is a file"), (tmp_path / "none", "no such directory"), ("", "empty"), ("./x", "no such"),
        ("-bad-/name", "valid Hub id"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            resolve_checkpoint(name)
    with pytest.raises(CheckpointError, match="leaves"):
        resolve_checkpoint(tmp_path, subfolder="..")
    with pytest.raises(CheckpointError, match="no such subfolder"):
        resolve_checkpoint(tmp_path, subfolder="sub")
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint_table(tmp_path)
    assert resolve_checkpoint(tmp_path) == tmp_path
