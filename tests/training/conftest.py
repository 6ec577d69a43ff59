"""The embedded model's tokenizer: byte-level pieces, a begin token (0) before a text, an end token (1), no template."""

from __future__ import annotations

import json

import pytest

from easydel.assets import embedded_model_path
from easydel.cli.text import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(embedded_model_path())


@pytest.fixture
def jsonl(tmp_path):
    """Write records as JSON lines (strings as they are) and return the file."""

    def write(records, name="data.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write
