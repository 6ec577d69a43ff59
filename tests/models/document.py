"""docs/families.md as text: the table of families, and beside each proof what it measured."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping

from tests.models.measure import Case, Comparison
from tests.models.proofs import PROOFS, SECTIONS
from tests.models.table import FAMILIES, Family, Variant

Measured = Mapping[Case, Comparison | None]
Cells = Mapping[str, Mapping[str, str]]
"""Family, or `ALLOWED` → proof → what its cell says, reasons left out."""

PACKAGES = ("jax", "flax", "transformers", "torch")
OPEN = "·"  # where a measurement will stand
ALLOWED = "*allowed*"
HEAD = """# Families: what is proved of each, and how closely

Every family is built twice, by transformers and here, tiny and with the same random weights, and held to the proofs
below. This page is written by `make families`, which runs them and refuses to write it if one fails or is not run; run
for some families, it writes their rows and leaves the others as they are.

| A cell | says |
| --- | --- |
| a number | the largest relative error, max abs(got - wanted) / max abs(wanted), of all variants and all compared |
| exact | all numbers are the same |
| ✓ | it passed, and there is nothing to measure: errors that must be raised, or chance; or the number was not kept |
| — | the family is not held to it, for the reason below the table |

*Allowed* is the largest error that passes; where a proof compares in two ways, with transformers and with itself, that
of the looser. A gradient that is next to nothing is compared with a thousandth of the model's largest, under a
scan every gradient with that largest, a key's bias on devices with its kernel's. All is float32, except in the proof
of bfloat16; the error in the proof of dropout is that of the run without it.

The errors are rounding, which differs between machines and versions, hence one digit. These were measured on a CPU,
as `tests/conftest.py` sets it up (compiled without LLVM's optimisations), with
{versions}.
"""
TAIL = """## Variants
*main*: held to every proof that the family is; *thorough*: to those of thorough variants and of every variant; *every*:
to those of every variant; then the proofs that are asked for, or left out, besides.
"""


def page(measured: Measured | None, kept: Cells | None = None) -> str:
    """Return the whole document.

    Args:
        measured: every case of the table → its largest error; `None`: the document with its measurements left open.
        kept: families that `measured` is without → what their cells say.
    """
    installed = ", ".join(f"`{name} {importlib.metadata.version(name)}`" for name in PACKAGES)
    parts = [HEAD.format(versions=installed), classes()]
    parts += [section(title, proofs, measured, kept or {}) for title, proofs in SECTIONS.items()]
    return "\n".join([*parts, TAIL, *(variants(family) for family in FAMILIES.values())])


def without_measurements(text: str) -> str:
    """Return the document as it is for any measurements and versions."""
    text = re.sub(r"(?<=\| )(?:\de[+-]\d+|exact|✓)(?= )", OPEN, text)
    return re.sub(rf"`({'|'.join(PACKAGES)}) [\w.+-]+`", r"`\1`", text)


def cells(text: str) -> Cells:
    """Return what the cells of a written document say."""
    found: dict[str, dict[str, str]] = {}
    for head, body in re.findall(r"^\| family \| (.*) \|\n\| -.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        proofs = head.split(" | ")
        for line in body.splitlines():
            name, *row = line.strip("| ").split(" | ")
            if len(row) == len(proofs) and set(proofs) <= PROOFS.keys():
                found.setdefault(name, {}).update(zip(proofs, (cell.split(" ")[0] for cell in row), strict=True))
    return found


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def classes() -> str:
    """Return where each family is, and whom its classes are compared with."""
    # The registry imports JAX, which `tests/conftest.py` must have set up before.
    from easydel.infra.registry import FAMILIES as REGISTERED

    body = []
    for family in FAMILIES.values():
        file = REGISTERED[family.name][0].replace(".", "/") + ".py"
        tasks = []
        for task in family.theirs:
            ours, theirs = family.class_name(task, "ours"), family.class_name(task, "theirs")
            tasks.append(f"{task}: `{ours}`" + (f" (compared with `{theirs}`)" if ours != theirs else ""))
        body.append([family.name, f"[{file}](../{file})", ", ".join(tasks)])
    head = ("family", "file", "tasks and classes, which have transformers' names")
    return "## Classes\n" + rows(head, body)


def section(title: str, proofs: Iterable[str], measured: Measured | None, kept: Cells) -> str:
    """Return the claims of some proofs and the table of what they measured, with its notes."""
    claims = "".join(f"- **{proof}**: {PROOFS[proof].claim} ({where(proof)}).\n" for proof in proofs)
    notes: list[str] = []
    body = [
        [family.name, *(cell(family, proof, measured, kept.get(family.name), notes) for proof in proofs)]
        for family in FAMILIES.values()
    ]
    body.append([ALLOWED, *(allowed(proof, measured, kept.get(ALLOWED)) for proof in proofs)])
    listed = "".join(f"{index}. {note}.\n" for index, note in enumerate(notes, 1))
    return f"## {title}\n{claims}\n{rows(['family', *proofs], body)}" + (listed and f"\n{listed}")


def where(proof: str) -> str:
    return {"every": "every variant", "thorough": "thorough variants", "main": "main variant"}[PROOFS[proof].on]


def cell(
    family: Family, proof: str, measured: Measured | None, kept: Mapping[str, str] | None, notes: list[str]
) -> str:
    """Return what a proof says of a family, and add its reasons to the notes."""
    reason = family.excuse(proof)
    reasons = [reason] if reason else []
    reasons += [f"not in `{v.name}`: {v.excused[proof]}" for v in family.variants if proof in v.excused]
    notes += [reason for reason in dict.fromkeys(reasons) if reason not in notes]
    marks = "".join(f" ({notes.index(reason) + 1})" for reason in reasons)
    if reason:
        return f"—{marks}"
    if measured is None:
        return f"{OPEN}{marks}"
    if kept is not None:
        return f"{kept[proof]}{marks}"
    found = [measured[Case(proof, family.name, variant.name)] for variant in family.held_to(proof)]
    errors = [comparison.error for comparison in found if comparison]
    return f"{number(max(errors)) if errors else '✓'}{marks}"


def allowed(proof: str, measured: Measured | None, kept: Mapping[str, str] | None) -> str:
    found = [] if measured is None else [c.tolerance for case, c in measured.items() if case.proof == proof and c]
    if kept is not None and kept[proof] not in (OPEN, "exact"):
        found.append(float(kept[proof]))
    return number(max(found)) if found else OPEN


def number(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-") if error else "exact"


def variants(family: Family) -> str:
    """Return in what each variant differs from the family's tiny config, and what it is held to."""
    body = [[variant.name, differences(variant), held_to(family, variant)] for variant in family.variants]
    config = f"Tiny config: {fields(family.config)}.\n\n"
    return f"### {family.name}\n{config}{rows(('variant', 'differs in', 'proofs'), body)}"


def fields(config: Mapping[str, object]) -> str:
    return f"`{', '.join(f'{name}={json.dumps(value)}' for name, value in config.items())}`" if config else "nothing"


def differences(variant: Variant) -> str:
    old = "" if variant.legacy is None else f"an old `config.json` with {fields(variant.legacy)}"
    return ", ".join(part for part in (old, fields(variant.config) if variant.config or not old else "") if part)


def held_to(family: Family, variant: Variant) -> str:
    """Return which proofs a variant is held to, in the words of `TAIL`."""
    kind = "main" if variant is family.main else "thorough" if variant.thorough else "every"
    return ", ".join([kind, *sorted(variant.proofs), *(f"not {proof}" for proof in sorted(variant.excused))])
