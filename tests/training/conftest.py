"""What the tests of training share: compiled programs, the embedded model's tokenizer, files of JSON lines."""

from __future__ import annotations

import json

import pytest

from easydel.assets import embedded_model_path
from easydel.cli.text import load_tokenizer
from tests.compiled import compiled_once


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory):
    """JAX's persistent cache, in a folder of its own: runs of the same shape are compiled once; returns the folder."""
    with compiled_once(tmp_path_factory.mktemp("compiled")) as folder:
        yield folder


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level pieces, a begin token (0) before a text, an end token (1), no template."""
    return load_tokenizer(embedded_model_path())


@pytest.fixture
def jsonl(tmp_path):
    """Write records as JSON lines (strings as they are) and return the file."""

    def write(records, name="data.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write
