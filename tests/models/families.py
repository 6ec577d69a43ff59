"""Runs the proofs of every family, or of some, and writes docs/families.md (`make families`)."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.models.document import ALLOWED, Cells, cells, page
from tests.models.measure import Case, Collected
from tests.models.proofs import PROOFS
from tests.models.table import FAMILIES, cases

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parents[1] / "docs" / "families.md"


def unproved(collected: Collected, families: Collection[str] = FAMILIES) -> list[str]:
    """Return what keeps the document from being written: every case of these families must have been run and passed."""
    wanted = {Case(proof, *names) for proof in PROOFS for names in cases(proof) if names[0] in families}
    found = set(collected.cases)
    return [
        *(f"failed or skipped: {test}" for test in collected.missed),
        *(f"not run: {' / '.join(case)}" for case in sorted(wanted - found)),
        *(f"run, but not in the table: {' / '.join(case)}" for case in sorted(found - wanted)),
    ]


def rows_of_others(families: Collection[str]) -> Cells:
    """Return what the document says of the families that are not run.

    Raises:
        SystemExit: of one of them it says nothing, or less than there is to say now.
    """
    written = cells(DOCUMENT.read_text(encoding="utf-8"))
    kept = {name: written.get(name, {}) for name in (*FAMILIES.keys() - families, ALLOWED)}
    if lacking := sorted(name for name, row in kept.items() if row.keys() != PROOFS.keys()):
        raise SystemExit(f"{DOCUMENT.name} has no whole row of {', '.join(lacking)}: name them, too, or run all")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the proofs of every family and write docs/families.md.")
    parser.add_argument("--jobs", default="2", help="processes that run tests")
    parser.add_argument(
        "--family", action="append", choices=FAMILIES, metavar="NAME", help="run this one, and keep the rows of others"
    )
    chosen = parser.parse_args()
    families = chosen.family or list(FAMILIES)
    kept = rows_of_others(families) if chosen.family else {}
    collected = Collected()
    # Whole rows only: part of a family's proofs would make a document that says more than was run.
    options = ["-q", "-m", "proof", "-n", chosen.jobs, "--dist", "loadgroup"]
    if chosen.family:
        options += ["-k", " or ".join(f"[{name}-" for name in families)]
    status = pytest.main([str(TESTS), *options], plugins=[collected])
    problems = unproved(collected, families)
    if status or problems:
        print("\n".join([f"{DOCUMENT.name} is left as it is; pytest's status: {int(status)}", *problems]))
        return 1
    DOCUMENT.write_text(page(collected.cases, kept), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
