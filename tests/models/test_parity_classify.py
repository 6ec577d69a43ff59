"""Sequence classification against transformers: which token counts, and the loss of each problem.

Independent of the family, so Llama stands for all; `test_parity_tasks.py` asks every family whether it has the class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.inputs import as_torch, pad
from tests.models.pairs import Pair, close, pair


def classifier(labels: int, problem: str | None = None, pad_token: int | None = 0) -> Pair:
    names = {str(i): f"L{i}" for i in range(labels)}
    fields: dict[str, Any] = {
        "id2label": names,
        "label2id": {v: int(k) for k, v in names.items()},
        "pad_token_id": pad_token,
        "problem_type": problem,
    }
    return pair("llama", "gqa", "sequence-classification", **fields)


def inputs(case: Pair, left: bool) -> dict[str, np.ndarray]:
    return case.inputs(*pad(case.rows((9, 4, 6)), 9, left=left))


@pytest.mark.parametrize("labels", [1, 3])
def test_logits(labels: int) -> None:
    case = classifier(labels)
    for left in (True, False):
        given = inputs(case, left)
        close(case.run(**given).logits, case.theirs(**given).logits, 1e-4, f"left={left}")
        alone = {"input_ids": given["input_ids"][1:2]}  # padding that no mask marks is found by its token
        close(case.run(**alone).logits, case.theirs(**alone).logits, 1e-4, "without a mask")


@pytest.mark.parametrize(
    ("labels", "problem", "targets"),
    [
        (1, None, np.array([0.5, -1.0, 2.0], np.float32)),
        (3, None, np.array([2, 0, 1], np.int32)),
        (3, None, np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], np.float32)),
        (1, "regression", np.array([0.5, -1.0, 2.0], np.float32)),
        (3, "regression", np.arange(9, dtype=np.float32).reshape(3, 3)),
        (3, "single_label_classification", np.array([2, 0, 1], np.int32)),
        (3, "single_label_classification", np.array([2, -100, 1], np.int32)),
        (3, "multi_label_classification", np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], np.float32)),
    ],
)
def test_loss(labels: int, problem: str | None, targets: np.ndarray) -> None:
    case = classifier(labels, problem)
    given = inputs(case, left=False) | {"labels": targets}
    case.hf.config.problem_type = problem  # transformers writes its guess into the config
    close(case.run(**given).loss, case.hf(**as_torch(given)).loss, 1e-5)


def test_without_a_padding_token_the_mask_says_which_token_is_last() -> None:
    case = classifier(3, pad_token=None)
    for left in (True, False):
        given = inputs(case, left)
        got = case.run(**given).logits
        for row, keep in enumerate(given["attention_mask"]):
            alone = case.theirs(input_ids=given["input_ids"][row : row + 1, keep == 1]).logits[0]
            close(got[row], alone, 1e-4, f"row {row}, left={left}")
