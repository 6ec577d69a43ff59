"""The report of a proof's test says what the test compared; `tests/models/families.py` reads it.

Every run has of each family, in its main variant, what computing, loading, saving, training and caching could break.
What its other variants are there for, and what shared layers do, whatever the family, is proved in every run of
`SAMPLE`, what has a tests' folder of its own of the `FEW`; of the other families in the slow group (`make families`, or
`ARGS="-m slow"`), which runs the whole table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.models.measure import PROPERTY, proved, recording
from tests.models.proofs import PROOFS
from tests.models.table import FAMILIES, SAMPLE

FEW = ("llama", "gemma2", "mamba2", "mixtral", "t5")
OF_FEW = {
    *("nf4", "8bit", "a8bit", "a8q", "a4q", "quantized_sharding", "lora_identity", "lora_merged", "lora_sharding"),
    *("scan", "scan_cache", "remat", "mechanisms", "sdpa", "dropout"),
}
OF_THE_SAMPLE = OF_FEW | {
    *("bfloat16", "mask_width", "gaps", "end_of_text"),
    *("fresh", "padding_token", "positions", "embeds", "segments", "sharding", "right_padding"),
    *("tasks", "left_padding", "generate"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        proofs = {mark.args[0] for mark in item.iter_markers("proof")}
        if proofs and not _is_in_every_run(proofs, item.callspec.params):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


def _is_in_every_run(proofs: set[str], params: dict[str, Any]) -> bool:
    family = FAMILIES[params["family"]]
    variant = family.variant(params["variant"]) if "variant" in params else family.main
    if family.name not in SAMPLE:
        return variant is family.main and not proofs <= OF_THE_SAMPLE
    if proofs <= OF_FEW and family.name not in FEW:
        return False
    return variant is family.main or any(PROOFS[proof].on == "every" or proof in variant.proofs for proof in proofs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    marks = list(item.iter_markers("proof"))
    with recording() as recorded:
        yield
    if marks:
        item.user_properties.append((PROPERTY, proved(marks, item.callspec.params, recorded)))
