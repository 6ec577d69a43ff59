"""Runs the proofs of every family and writes docs/families.md (`make families`)."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.models.document import page
from tests.models.measure import Case, Collected
from tests.models.proofs import PROOFS
from tests.models.table import cases

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parents[1] / "docs" / "families.md"


def unproved(collected: Collected) -> list[str]:
    """Return what keeps the document from being written: every case of the table must have been run and passed."""
    wanted = {Case(proof, *names) for proof in PROOFS for names in cases(proof)}
    found = set(collected.cases)
    return [
        *(f"failed or skipped: {test}" for test in collected.missed),
        *(f"not run: {' / '.join(case)}" for case in sorted(wanted - found)),
        *(f"run, but not in the table: {' / '.join(case)}" for case in sorted(found - wanted)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the proofs of every family and write docs/families.md.")
    parser.add_argument("--jobs", default="2", help="processes that run tests")
    jobs = parser.parse_args().jobs
    collected = Collected()
    # Nothing else can be selected: part of the proofs would make a document that says more than was run.
    options = ["-q", "-m", "proof", "-n", jobs, "--dist", "loadgroup"]
    status = pytest.main([str(TESTS), *options], plugins=[collected])
    problems = unproved(collected)
    if status or problems:
        print("\n".join([f"{DOCUMENT.name} is left as it is; pytest's status: {int(status)}", *problems]))
        return 1
    DOCUMENT.write_text(page(collected.cases), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
