"""Every family of the table: the classes of its other tasks against transformers, outputs and loss."""

from __future__ import annotations

import pytest

from tests.models.inputs import pad
from tests.models.pairs import close, pair, same_outputs
from tests.models.table import FAMILIES, cases

NAMES = {"0": "L0", "1": "L1", "2": "L2"}
FIELDS = {"id2label": NAMES, "label2id": {name: int(index) for index, name in NAMES.items()}, "pad_token_id": 0}

OTHERS = [(family, variant, task) for family, variant in cases("tasks") for task in FAMILIES[family].others]
PADDED_LEFT = cases("left_padding")


@pytest.mark.proof("tasks")
@pytest.mark.proof("left_padding", of="left=True")
@pytest.mark.parametrize(("family", "variant", "task"), OTHERS)
def test_other_tasks(family: str, variant: str, task: str) -> None:
    case = pair(family, variant, task, **({} if task == "question-answering" else FIELDS))
    whole = case.inputs(case.ids(3, 9))
    same_outputs(case.run(**whole), case.theirs(**whole), 1e-4)
    lengths = (9, 9, 9) if task in FAMILIES[family].reads_padding else (9, 4, 6)
    for left in (True, False) if (family, variant) in PADDED_LEFT else (False,):
        inputs = case.labelled(*pad(case.rows(lengths), 9, left=left))
        got, want = case.run(**inputs), case.theirs(**inputs)
        close(got.loss, want.loss, 1e-5, f"loss, left={left}")
        if task == "sequence-classification":  # elsewhere there are logits of padding, which nobody reads
            close(got.logits, want.logits, 1e-4, f"logits, left={left}")
