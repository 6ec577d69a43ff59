"""The embedded model, loaded once for all tests of the commands."""

from __future__ import annotations

import pytest

from easydel.assets import embedded_model_path
from easydel.cli.text import load_model, load_tokenizer
from tests.cli.shorter import write_shorter


@pytest.fixture(scope="session")
def embedded():
    """Model (float32) and tokenizer."""
    return load_model(embedded_model_path()), load_tokenizer(embedded_model_path())


@pytest.fixture(scope="session")
def shorter_folder(tmp_path_factory):
    """Two layers of the embedded model, for what does not depend on how well it writes."""
    return write_shorter(tmp_path_factory.mktemp("shorter") / "stdlib-4m", 2)


@pytest.fixture(scope="session")
def shorter(shorter_folder):
    """Its model (float32) and tokenizer."""
    return load_model(shorter_folder), load_tokenizer(shorter_folder)
