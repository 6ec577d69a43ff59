"""The embedded model, loaded once for all tests of the commands."""

from __future__ import annotations

import pytest

from easydel.assets import embedded_model_path
from easydel.cli.text import load_model, load_tokenizer


@pytest.fixture(scope="session")
def embedded():
    """Model (float32) and tokenizer."""
    return load_model(embedded_model_path()), load_tokenizer(embedded_model_path())
