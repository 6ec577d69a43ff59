"""Property-based fuzzing of the reader: the right values, or an error of our own; never anything else.

The normal run tries a few hundred cases. `-m slow` tries thousands; `EASYDEL_FUZZ=20000` sets their number.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load as reference_load

from easydel.errors import CheckpointError
from easydel.hub.resolve import checkpoint_table
from easydel.hub.safetensors import DTYPES
from tests.hub import checkpoint as ck

MANY = int(os.environ.get("EASYDEL_FUZZ", "2000"))
KINDS = ("F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3")
Table = dict[str, dict[str, Any]]

numbers = st.one_of(
    st.integers(-4, 80), st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, 10**40, -(2**63)])
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8), st.sampled_from(sorted(DTYPES))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = st.text(max_size=6) | st.sampled_from(["a", "b", "__metadata__", "../x", "a\0", "\ud800", "é" * 400])


@contextmanager
def directory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="easydel-fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, bytes]:
    """Draw a valid header and its data."""
    table, data = {}, b""
    for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)):
        kind = draw(st.sampled_from(KINDS))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[kind].itemsize
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes((7 * i + len(data)) % 2 if kind == "BOOL" else (7 * i + len(data)) % 120 for i in range(size))
    return table, data


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a file: a valid one, changed where its structure says something, and then in its bytes."""
    table, data = draw(tables())
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(["field", "number", "drop field", "drop", "add", "swap", "copy", "rename"]))
        some = sorted(name for name, fields in table.items() if isinstance(fields, dict))
        if change == "add":
            table[draw(names)] = draw(values)
        elif some:
            name = draw(st.sampled_from(some))
            other = draw(st.sampled_from(some))
            fields = table[name]
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
            if change == "field":
                fields[key] = draw(values)
            elif change == "number" and isinstance(fields.get(key), list) and fields[key]:
                fields[key][draw(st.integers(0, len(fields[key]) - 1))] = draw(numbers)
            elif change == "drop field":
                fields.pop(key, None)
            elif change == "drop":
                del table[name]
            elif change == "swap" and isinstance(table[other], dict):
                fields["data_offsets"], table[other]["data_offsets"] = (
                    table[other].get("data_offsets"), fields.get("data_offsets"),
                )  # fmt: skip
            elif change == "copy":
                table[name + name] = dict(fields)
            elif change == "rename":
                table[draw(names)] = table.pop(name)
    text = json.dumps(table).encode()
    if draw(st.integers(0, 9)) == 0 and table:  # a name that occurs twice
        text = text[:-1] + b", " + json.dumps(draw(st.sampled_from(sorted(table)))).encode() + b": 1}"
    length = len(text) + draw(st.sampled_from([0] * 8 + [1, -1, 8, 2**31, 2**63]))
    return damaged(draw, max(0, length).to_bytes(8, "little") + text + data)


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, cut or insert bytes in a third of all cases."""
    kind = draw(st.sampled_from(["none"] * 6 + ["flip", "cut", "insert"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:] if kind == "insert" else content


@contextmanager
def bounded() -> Iterator[None]:
    """Check the clock (5 s) and the peak of memory (1 GB)."""
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time()
    yield
    assert min(time.monotonic() - start, time.process_time() - cpu) < 5  # the processor's time on a busy machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20


def read_all(folder: Path) -> dict[str, Any] | None:
    """Read every tensor; `None` if the reader refuses."""
    with bounded():
        try:
            return {name: (entry, entry.read()) for name, entry in checkpoint_table(folder).items()}
        except CheckpointError as error:
            text = str(error)
    text.encode()  # it can be printed
    assert str(folder) in text
    assert len(text) < 20_000
    return None


def check_file(content: bytes) -> None:
    """Read a single file; if that works, it must be exactly what the file says, to us and to the reference."""
    with directory() as folder:
        (folder / ck.SINGLE).write_bytes(content)
        found = read_all(folder)
        if found is None:
            return
        end = 8 + int.from_bytes(content[:8], "little")
        said = {name: fields for name, fields in json.loads(content[8:end]).items() if name != "__metadata__"}
        data, taken = content[end:], []
        assert found.keys() == said.keys()
        for name, (_, array) in found.items():
            start, stop = said[name]["data_offsets"]
            taken.append((start, stop))
            assert array.dtype == DTYPES[said[name]["dtype"]]
            assert list(array.shape) == said[name]["shape"]
            if array.dtype == np.bool_:  # any byte but 0 is true
                assert (
                    array.view(np.uint8) == (np.frombuffer(data[start:stop], np.uint8).reshape(array.shape) != 0)
                ).all()
            else:
                assert array.tobytes() == data[start:stop]
        assert sum(stop - start for start, stop in taken) == len(data)
        try:
            reference = reference_load(content)
        except (SafetensorError, KeyError, AttributeError, TypeError, ValueError):
            return  # it cannot hold some of our dtypes, and is stricter about blanks before the header
        for name, array in reference.items():
            if array.dtype == np.bool_:  # the reference keeps a byte such as 7 as it is
                array = array.view(np.uint8) != 0
            assert found[name][1].tobytes() == array.tobytes()


PLACES = st.text(max_size=9).map(lambda text: text + ".safetensors") | st.sampled_from([
    "a.safetensors", "b.safetensors", "c.safetensors", "../a.safetensors", "/a.safetensors", "./a.safetensors",
    "C:\\a.safetensors", "x/../a.safetensors", "", ".safetensors", "a.safetensors\0", "config.json",
])  # fmt: skip


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """Draw an index file of the shards that `check_index` writes: valid, changed in structure, then in bytes."""
    weight_map: Any = {name: ("a" if i < 9 else "b") + ".safetensors" for i, name in enumerate(ck.tensors())}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(weight_map)) if weight_map else names)
        change = draw(st.sampled_from(["move", "drop", "add", "value", "rename"]))
        if change == "move":
            weight_map[name] = draw(PLACES)
        elif change == "drop":
            weight_map.pop(name, None)
        elif change == "add":
            weight_map[draw(names)] = draw(PLACES)
        elif change == "value":
            weight_map[name] = draw(values)
        elif name in weight_map:
            weight_map[draw(names)] = weight_map.pop(name)
    forms = [{"weight_map": weight_map}] * 8 + [{"metadata": draw(values), "weight_map": weight_map}, weight_map]
    document = draw(st.sampled_from(forms) | values) if draw(st.integers(0, 5)) == 0 else forms[0]
    return damaged(draw, json.dumps(document).encode())


def check_index(content: bytes) -> None:
    """Read two good shards through an index; if that works, all tensors must be there, with their values."""
    with directory() as folder:
        ck.write_sharded(folder, WANT)
        (folder / ck.INDEX).write_bytes(content)
        found = read_all(folder)
        if found is not None:
            assert found.keys() == WANT.keys()
            for name, (_, array) in found.items():
                assert array.tobytes() == WANT[name].tobytes()


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


WANT = ck.tensors()
PROPERTIES: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "header": (check_file, mutated()),
    "bytes": (check_file, st.binary(max_size=200) | st.binary(max_size=80).map(with_length)),
    "index": (check_index, indexes()),
}  # fmt: skip


def run(kind: str, examples: int) -> None:
    check, strategy = PROPERTIES[kind]
    limits = settings(
        max_examples=examples, deadline=None, database=None, derandomize=examples < MANY,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    limits(given(strategy)(check))()


@pytest.mark.parametrize(("kind", "examples"), [("header", 120), ("bytes", 60), ("index", 100)])
def test_fuzz(kind: str, examples: int) -> None:
    run(kind, examples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROPERTIES)
def test_fuzz_thousands(kind: str) -> None:
    run(kind, MANY)
