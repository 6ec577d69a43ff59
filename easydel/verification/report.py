"""What a comparison found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

FINITE = "not finite"


@dataclass(frozen=True)
class Part:
    """One part of the model, or what it returns.

    Attributes:
        name: in transformers.
        path: here; empty for what is no module.
        error: `max|ours - theirs| / max|theirs|` where there are tokens; infinite if a number is not finite, or if the
            shapes do not fit.
        input_error: likewise, of what the module was given; 0 if that is no float array.
        agrees: whether the error is allowed.
        note: why an error is infinite.
    """

    name: str
    path: str
    error: float
    input_error: float
    agrees: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as what `json` can write: an infinite error is `None`."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class Verification:
    """How a checkpoint compares with transformers.

    Attributes:
        checkpoint: what was compared.
        model: the class, here and in transformers.
        dtype: in which both computed.
        tolerance: the largest error that is allowed.
        batch: rows of tokens.
        length: tokens of a row.
        parts: in the order of execution: embeddings, layers, norms after them, outputs.
        inside: the modules inside the first part that differs, as far as both models have them; else empty.
        first: the first module whose output differs though its input does not, else the part; `None`: all is equal.
    """

    checkpoint: str
    model: str
    dtype: str
    tolerance: float
    batch: int
    length: int
    parts: tuple[Part, ...]
    inside: tuple[Part, ...]
    first: Part | None

    @property
    def equal(self) -> bool:
        """Whether every part agrees."""
        return self.first is None

    @property
    def largest_error(self) -> float:
        """The largest error of a part."""
        return max(part.error for part in self.parts)

    def verdict(self) -> str:
        """Return one line that says how it went."""
        first = self.first
        if first is None:
            return f"equal: largest relative error {self.largest_error:.1e} (allowed {self.tolerance:g})"
        where = f" (here {first.path})" if first.path and first.path.replace("/", ".") != first.name else ""
        what = first.note or f"relative error {first.error:.1e} (allowed {self.tolerance:g})"
        return f"differs first at {first.name}{where}: {what}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what `json` can write; an infinite error is `None`."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found |= {name: [part.to_dict() for part in found[name]] for name in ("parts", "inside")}
        largest = self.largest_error
        found["first"] = None if self.first is None else self.first.to_dict()
        found["largest_error"] = largest if math.isfinite(largest) else None
        return {"equal": self.equal, **found, "verdict": self.verdict()}

    def __str__(self) -> str:
        """Return one line for each part, and the verdict."""
        width = max(len(part.name) for part in (*self.parts, *self.inside))
        lines = [line for part in self.parts for line in self._lines(part, width)]
        return "\n".join([*lines, self.verdict()])

    def _lines(self, part: Part, width: int) -> list[str]:
        return [f"{p.name:{width}}  {error_text(p):>8}  {verdict_of(p)}" for p in (part, *self.inside_of(part))]

    def inside_of(self, part: Part) -> tuple[Part, ...]:
        """Return the modules inside a part, which are told for the first part that differs alone."""
        differing = next((p for p in self.parts if not p.agrees), None)
        return self.inside if part is differing else ()


def error_text(part: Part) -> str:
    """Return an error as a number, or a dash where there is none."""
    return f"{part.error:.1e}" if math.isfinite(part.error) else "-"


def verdict_of(part: Part) -> str:
    """Return what is to be said of one part."""
    if part.agrees:
        return "equal"
    return f"differs: {part.note}" if part.note else "differs"
