"""An adapter of PEFT's that several files break, or carry about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def case() -> Any:
    """A Llama of transformers, and ours."""
    from tests.models.pairs import pair
    from tests.models.table import FAMILIES

    return pair("llama", FAMILIES["llama"].main.name)


@pytest.fixture(scope="module")
def saved(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of PEFT's."""
    from tests.lora.peft_models import peft_of

    folder = tmp_path_factory.mktemp("sound")
    peft_of(case, target_modules=["q_proj", "v_proj"]).save_pretrained(folder)
    return folder
