"""What the proofs measure, kept while they run; `tests/models/families.py` makes docs/families.md of it.

Comparisons call `record`, and what a test recorded travels with its report (`tests/models/conftest.py`), so that it
arrives from pytest-xdist's workers as everything else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.models.table import FAMILIES

PROPERTY = "proofs"  # of a test's report: [proof, family, variant, error, tolerance], the last two may be `None`


class Case(NamedTuple):
    """What is proved once: of a family, in one of its variants."""

    proof: str
    family: str
    variant: str


class Comparison(NamedTuple):
    """The largest relative error found, and the largest that is allowed."""

    error: float
    tolerance: float

    def and_also(self, other: Comparison) -> Comparison:
        return Comparison(max(self.error, other.error), max(self.tolerance, other.tolerance))


Recorded = list[tuple[str, Comparison]]  # in words what was compared, and how it came out
_RUNNING: list[Recorded] = []


def record(what: str, error: float, tolerance: float) -> None:
    """Note a comparison of the test that runs."""
    if _RUNNING:
        _RUNNING[-1].append((what, Comparison(float(error), float(tolerance))))


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Collect what is recorded meanwhile."""
    _RUNNING.append([])
    try:
        yield _RUNNING[-1]
    finally:
        _RUNNING.pop()


def largest(recorded: Recorded, of: str | None, others: list[str]) -> Comparison | None:
    """Return the worst of the comparisons that belong to a proof; `None` if there is none.

    Args:
        recorded: by one test.
        of: part of the words by which the proof's comparisons are known; `None`: it has those of no other proof.
        others: such parts for the other proofs of the test.
    """
    worst = None
    for what, comparison in recorded:
        if of in what if of is not None else not any(other in what for other in others):
            worst = comparison if worst is None else worst.and_also(comparison)
    return worst


def proved(marks: list[pytest.Mark], params: dict[str, Any], recorded: Recorded) -> list[list[Any]]:
    """Return the cases that a test stands for, as rows for its report.

    Args:
        marks: the test's `proof("name")`, and `proof("name", of="words")` of one that shares the test and has only the
            comparisons with these words: without any, it was not run.
        params: the test's; one without a variant stands for the family's main one.
        recorded: by the test.
    """
    shared = [mark.kwargs["of"] for mark in marks if "of" in mark.kwargs]
    rows = []
    for mark in marks:
        (proof,), of = mark.args, mark.kwargs.get("of")
        worst = largest(recorded, of, shared)
        if worst is not None or of is None:
            family = params["family"]
            rows.append([proof, family, params.get("variant", FAMILIES[family].main.name), *(worst or (None, None))])
    return rows


class Collected:
    """What the reports of a whole run say.

    Attributes:
        cases: those whose tests all passed so far → the largest error, or `None` where there was nothing to compare.
        missed: the tests of proofs that failed or were skipped.
    """

    def __init__(self) -> None:
        self.cases: dict[Case, Comparison | None] = {}
        self.missed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "proof" in report.keywords and not report.passed:
            self.missed.append(report.nodeid)
        elif report.when == "call":
            for *names, error, tolerance in dict(report.user_properties).get(PROPERTY, ()):
                self._add(Case(*names), None if error is None else Comparison(error, tolerance))

    def _add(self, case: Case, new: Comparison | None) -> None:
        old = self.cases.get(case)
        self.cases[case] = old.and_also(new) if old and new else old or new
