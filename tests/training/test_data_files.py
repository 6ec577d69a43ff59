"""Documents are found by their bytes and read when they are needed; what is wrong is told with its file and line."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easydel.assets import embedded_text_path
from easydel.training.data import DataConfig, files, make_loader, records
from easydel.training.data.files import expand_paths, index_file, line_number, read_span
from easydel.training.data.records import open_records


def spans_of(index):
    return [read_span(index.path, int(start), int(end)) for start, end in zip(index.starts, index.ends, strict=True)]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\n\n", b"--", b"-", b"x" * 70, b" " * 30]), max_size=40),
    st.sampled_from([b"\n", b"\n\n", b"--", b"-\n-", b"\n \n"]),
    st.integers(1, 40),
    st.booleans(),
)
def test_documents_are_what_stands_between_separators(tmp_path_factory, parts, separator, chunk, mark):
    data = b"".join(parts)
    path = tmp_path_factory.getbasetemp() / "data.txt"
    path.write_bytes(files.MARK * mark + data)
    expected = [part for part in data.split(separator) if part.strip() or len(part) > 64]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        if expected:
            assert spans_of(index_file(path, separator)) == expected
        else:
            with pytest.raises(ValueError, match="is empty"):
                index_file(path, separator)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab é€😀\n", min_size=1, max_size=400).filter(str.strip), st.integers(16, 100))
def test_pieces_of_a_text_are_the_text(tmp_path_factory, text, piece_bytes):
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    index = index_file(path, None, piece_bytes)
    pieces = spans_of(index)
    assert b"".join(pieces) == text.encode()
    assert "".join(piece.decode() for piece in pieces) == text  # no character is cut in two
    assert index.opens.tolist() == [True] + [False] * (len(index) - 1)
    assert index.closes.tolist() == [False] * (len(index) - 1) + [True]
    assert max(map(len, pieces)) <= piece_bytes * 3 // 2 + max(piece_bytes // 4, 64)


def test_the_tokens_of_pieces_are_those_of_the_text(tokenizer):
    """Pieces end where the tokenizer's own do, and begin with the token before them as context."""
    path = embedded_text_path()
    config = DataConfig(path=path, sequence_length=64, packing=False, shuffle=False, epochs=1, prefetch=0)
    loader = make_loader(config, tokenizer, batch_size=1, drop_remainder=False)
    assert loader.records > 20
    rows = [(batch["input_ids"][0], batch["labels"][0], int(batch["attention_mask"].sum())) for batch in loader]
    expected = [*tokenizer.encode(path.read_bytes().decode(), verbose=False), tokenizer.eos_token_id]
    learned = np.concatenate([labels[labels != -100] for _, labels, _ in rows])
    assert learned.tolist() == expected[1:]
    place = 0
    for ids, _, used in rows:
        assert ids[:used].tolist() == expected[place : place + used]
        place += used - 1


def test_only_the_index_and_the_lines_needed_are_read(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"line {number} " + "word " * 30}) + "\n")
    size = path.stat().st_size
    assert size > 3_000_000
    monkeypatch.setattr(files, "CHUNK", 1 << 16)
    spans = []
    monkeypatch.setattr(records, "read_span", lambda *span: spans.append(span) or read_span(*span))
    tracemalloc.start()
    config = DataConfig(path=path, sequence_length=128, prefetch=0)
    loader = make_loader(config, tokenizer, batch_size=4)
    next(loader)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2  # the index and its checksum: 40 bytes a line while it is made, and some chunks
    assert len(spans) < 100
    assert sum(end - start for _, start, end in spans) < size / 100
    assert {span[0] for span in spans} == {path}


def test_lines_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 3)
    path = tmp_path / "lines.txt"
    path.write_bytes(b"a\n\nbb\nccc\n")
    assert [line_number(path, offset) for offset in (0, 1, 2, 3, 6, 9)] == [1, 1, 2, 3, 4, 4]


def test_paths_are_expanded_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in expand_paths(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt", "c[1].txt"]
    assert expand_paths([tmp_path / "b.txt", f"{tmp_path}/a*"]) == [tmp_path / "b.txt", tmp_path / "a.txt"]
    assert expand_paths(tmp_path / "c[1].txt") == [tmp_path / "c[1].txt"]
    for path, message in (
        (tmp_path, "is a folder"), (f"{tmp_path}/*.jsonl", "names no file"), ("nothing.txt", "names no file"),
        ([], "empty list"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            expand_paths(path)


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"text": "abc"}, "jsonl"), (CHAT, "chat"), (CHAT | {"text": "abc"}, "chat"),
        ({"prompt": "a", "completion": "b"}, "prompt"), ("abc", "text"),
    ],
)  # fmt: skip
def test_the_format_is_told_by_the_first_record(record, found, jsonl):
    assert open_records(DataConfig(), [record])[1].format == found
    if not isinstance(record, str):
        assert open_records(DataConfig(path=jsonl([record])))[1].format == found


def test_formats_that_cannot_be_told_or_do_not_fit_are_refused(tmp_path, jsonl):
    (tmp_path / "text.txt").write_text("abc")
    (tmp_path / "table.csv").write_text("abc")
    data = jsonl([{"body": "abc", "id": 3}])
    for config, message in (
        (DataConfig(path=data), "cannot be told from the fields body, id"),
        (DataConfig(path=tmp_path / "table.csv"), "the format of .csv is unknown"),
        (DataConfig(path=[tmp_path / "text.txt", data]), "cannot be mixed"),
        (DataConfig(path=data, text_separator="--", text_field="body"), "text_separator is for text files"),
        (DataConfig(), "got neither"),
    ):
        with pytest.raises(ValueError, match=message):
            open_records(config)
    with pytest.raises(ValueError, match="got both"):
        open_records(DataConfig(path=data), ["abc"])
    with pytest.raises(ValueError, match="sequence is empty"):
        open_records(DataConfig(), [])
    with pytest.raises(ValueError, match="needs mappings"):
        open_records(DataConfig(format="chat"), ["abc"])
    with pytest.raises(ValueError, match="use 'jsonl'"):
        open_records(DataConfig(format="text"), [{"text": "abc"}])
    with pytest.raises(TypeError, match="example 0: a record must be a text or a mapping, got int"):
        open_records(DataConfig(), [3])


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"text": "a', ValueError, r"data\.jsonl:3: broken JSON at column"),
        ('["a"]', ValueError, r"data\.jsonl:3: a line must hold a JSON object, got list"),
        ('{"txt": "a"}', ValueError, r"data\.jsonl:3: no field 'text', found txt \(did you mean 'txt'\?\)"),
        ('{"text": 3}', TypeError, r"data\.jsonl:3: the field 'text' must be str, got int"),
        ('{"text": ""}', ValueError, r"data\.jsonl:3: no trainable token"),
        ('{"text": "\\ud800"}', ValueError, r"data\.jsonl:3"),
    ],
)
def test_a_broken_line_is_named(line, error, message, jsonl, tokenizer):
    path = jsonl(['{"text": "fine"}', "", line])
    config = DataConfig(path=path, shuffle=False, epochs=1, sequence_length=8, prefetch=0)
    with pytest.raises(error, match=message):
        list(make_loader(config, tokenizer, batch_size=1))
    with make_loader(replace(config, prefetch=2, packing=False), tokenizer, batch_size=1) as loader:
        next(loader)
        with pytest.raises(error, match=message):  # from the thread, in its turn
            next(loader)


def test_text_that_is_not_utf8_is_named(tmp_path, tokenizer):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n--caf\xe9\n")
    config = DataConfig(path=path, text_separator="--", shuffle=False, prefetch=0)
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8 text"):
        next(make_loader(config, tokenizer, batch_size=1))


def test_a_file_that_shrinks_is_noticed(jsonl, tokenizer):
    path = jsonl([{"text": "abc"}, {"text": "defg"}])
    found = open_records(DataConfig(path=path))[0]
    path.write_text('{"text": "abc"}\n')
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        found[1]


def test_grain_is_asked_for_only_when_it_is_needed():
    program = """
import sys
from easydel.training import DataConfig, make_loader
assert "grain" not in sys.modules
sys.modules["grain"] = None
try:
    make_loader(["abc"], None, batch_size=1)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "reading training data needs grain: pip install 'easydel-base[train]'\n"


def test_a_path_is_no_sequence_of_examples(tokenizer):
    with pytest.raises(TypeError, match=r"DataConfig\(path='train.jsonl'\)"):
        make_loader("train.jsonl", tokenizer, batch_size=1)
    with pytest.raises(ValueError, match="two configs"):
        make_loader(DataConfig(path="a.txt"), tokenizer, batch_size=1, config=DataConfig())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sequence_length": 1}, ValueError, "sequence_length must be at least 2, got 1"),
        ({"sequence_length": 8.0}, TypeError, "sequence_length must be an integer"),
        ({"packing_rows": 0}, ValueError, "packing_rows"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"seed": 2**32}, ValueError, "below 2"),
        ({"format": "csv"}, ValueError, "format='csv' is unknown; choose one of 'auto'"),
        ({"truncate": "left"}, ValueError, "truncate='left'"),
        ({"window_start": "eos"}, ValueError, "window_start"),
        ({"path": 3}, TypeError, "path must be a file, a pattern or a list of them, got 3"),
        ({"path": ["a.txt", None]}, TypeError, "path must be a file"),
        ({"text_field": None}, TypeError, "text_field must be a string"),
        ({"chat_template": 3}, TypeError, "chat_template must be a string or None"),
        ({"packing": "yes"}, TypeError, "packing must be true or false"),
        ({"text_separator": ""}, ValueError, "text_separator must not be empty"),
    ],
)
def test_fields_out_of_range_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        DataConfig(**fields)


def test_unknown_fields_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="no field 'sequence_lenght'; did you mean 'sequence_length'"):
        DataConfig.from_dict({"path": "a.txt", "sequence_lenght": 8})
    assert DataConfig.from_dict({"path": ["a.txt", "b.txt"], "seed": 3}) == DataConfig(path=("a.txt", "b.txt"), seed=3)
