"""The table says all there is: nothing built in is missing, and nothing is left unproved without a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from easydel.infra import registry
from tests.models.proofs import PROOFS, SECTIONS
from tests.models.table import FAMILIES, Family, cases

TESTS = "\n".join(file.read_text() for file in Path(__file__).parent.glob("test_parity*.py"))


def test_every_built_in_family_stands_in_the_table_with_its_tasks() -> None:
    tasks = {name: {task.value for task in tasks} for name, (_, _, tasks) in registry.FAMILIES.items()}
    assert {name: set(family.theirs) for name, family in FAMILIES.items()} == tasks
    assert all(family.main_task in family.theirs for family in FAMILIES.values())


@pytest.mark.parametrize("proof", PROOFS)
def test_every_proof_is_a_test_and_run_somewhere(proof: str) -> None:
    assert f'cases("{proof}")' in TESTS
    assert f'proof("{proof}"' in TESTS, "the mark by which its measurements are known"
    assert cases(proof)


def test_every_proof_has_one_place_in_the_document() -> None:
    assert sorted(proof for proofs in SECTIONS.values() for proof in proofs) == sorted(PROOFS)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_no_family_is_excused_without_a_reason(family: Family) -> None:
    for proof in PROOFS:
        assert bool(family.held_to(proof)) != bool(family.excuse(proof)), f"{proof}: neither run nor excused, or both"
    places = [(family.excused, "the family")]
    places += [(variant.excused, variant.name) for variant in family.variants]
    for excused, place in places:
        assert excused.keys() <= PROOFS.keys(), place
        assert all(len(reason.split()) > 2 for reason in excused.values()), place


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_variants_are_named_once_and_ask_for_proofs_there_are(family: Family) -> None:
    names = [variant.name for variant in family.variants]
    assert len(names) == len(set(names))
    for variant in family.variants:
        assert set(variant.proofs) <= PROOFS.keys(), variant.name
        assert not set(variant.proofs) & set(variant.excused), variant.name
