"""docs/families.md is that of the table, and says of nothing that it passed which was not run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.models.document import cells, page, without_measurements
from tests.models.families import DOCUMENT, unproved
from tests.models.measure import PROPERTY, Case, Collected, Comparison, proved, record, recording
from tests.models.pairs import close, equal
from tests.models.proofs import PROOFS
from tests.models.table import cases as cases_of

EVERYTHING = {Case(proof, *names): Comparison(3.4e-7, 1e-4) for proof in PROOFS for names in cases_of(proof)}
OUTPUTS = pytest.mark.proof("outputs").mark
ATTENTIONS = pytest.mark.proof("attentions", of="attentions").mark
LLAMA = {"family": "llama", "variant": "mha"}


def report(outcome: str = "passed", error: Any = None, when: str = "call") -> Any:
    rows = [["outputs", "llama", "gqa", error, None if error is None else 1e-4]]
    properties = [(PROPERTY, rows)]
    return SimpleNamespace(
        nodeid="test_it", when=when, passed=outcome == "passed", keywords={"proof": 1}, user_properties=properties
    )


def test_the_document_is_that_of_the_table() -> None:
    written, expected = (without_measurements(text) for text in (DOCUMENT.read_text(encoding="utf-8"), page(None)))
    assert written == expected, "docs/families.md is not that of the table: run `make families`"


def test_measurements_are_all_that_the_table_leaves_open() -> None:
    one, other = page(EVERYTHING), page(dict.fromkeys(EVERYTHING))
    assert "| llama | 3e-7 |" in one
    assert "| llama | ✓ |" in other
    assert without_measurements(one) == without_measurements(other) == without_measurements(page(None))
    with pytest.raises(KeyError):
        page(dict(list(EVERYTHING.items())[1:]))


def test_rows_of_families_that_are_not_run_are_kept() -> None:
    numbers = {case: Comparison(1e-7 * (1 + n % 9), 1e-4) for n, case in enumerate(EVERYTHING)}
    whole = page(numbers)
    kept = {name: row for name, row in cells(whole).items() if name != "llama"}
    assert page({case: found for case, found in numbers.items() if case.family == "llama"}, kept) == whole
    with pytest.raises(KeyError):  # nor is anything made up for a family that is neither run nor kept
        page({}, {name: row for name, row in kept.items() if name != "t5"})


def test_the_largest_error_of_all_variants_is_shown() -> None:
    exact = {case: Comparison(0.0, 0.0) for case in EVERYTHING}
    assert "| llama | exact |" in page(exact)
    worst = exact | {Case("outputs", "llama", "mqa"): Comparison(2.6e-5, 1e-4)}
    assert "| llama | 3e-5 |" in page(worst)
    assert "| *allowed* | 1e-4 |" in page(worst)


def test_a_document_is_not_written_unless_everything_was_run_and_passed() -> None:
    collected = Collected()
    collected.cases = dict(EVERYTHING)
    assert unproved(collected) == []
    del collected.cases[Case("outputs", "llama", "mqa")]
    collected.cases[Case("outputs", "llama", "no_such")] = None
    collected.missed = ["test_it"]
    failed, missing, foreign = unproved(collected)
    assert (failed, missing) == ("failed or skipped: test_it", "not run: outputs / llama / mqa")
    assert foreign.endswith("not in the table: outputs / llama / no_such")


def test_reports_are_collected() -> None:
    collected, case = Collected(), Case("outputs", "llama", "gqa")
    for one in (report(error=1e-6), report(error=2e-6), report(), report(when="teardown", error=1.0)):
        collected.pytest_runtest_logreport(one)
    assert collected.cases == {case: Comparison(2e-6, 1e-4)}
    assert not collected.missed
    for outcome, when in (("failed", "call"), ("skipped", "setup"), ("failed", "teardown")):
        collected.pytest_runtest_logreport(report(outcome, when=when, error=1.0))
    assert collected.missed == ["test_it"] * 3
    assert collected.cases == {case: Comparison(2e-6, 1e-4)}


def test_two_proofs_share_the_comparisons_of_a_test() -> None:
    recorded = [("logits", Comparison(1e-6, 1e-4)), ("attentions[1]", Comparison(2e-6, 1e-4))]
    names = ["llama", "mha"]
    both = [["outputs", *names, 1e-6, 1e-4], ["attentions", *names, 2e-6, 1e-4]]
    assert proved([OUTPUTS, ATTENTIONS], LLAMA, recorded) == both
    assert proved([OUTPUTS, ATTENTIONS], LLAMA, recorded[:1]) == both[:1], "what was not compared was not proved"
    assert proved([OUTPUTS], {"family": "llama"}, []) == [["outputs", "llama", "gqa", None, None]]


def test_comparisons_are_kept_while_a_test_runs() -> None:
    with recording() as recorded:
        close([1.0, 2.0], [1.0, 2.5], 0.5, "logits")
        close([0.0], [0.1], 0.5, least=1.0)
        equal([3], [3])
        with pytest.raises(AssertionError):
            equal([3], [4])
    record("after it", 9.0, 9.0)
    assert recorded == [("logits", (0.2, 0.5)), ("", (0.1, 0.5)), ("", (0.0, 0.0))]
