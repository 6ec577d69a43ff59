"""The table of families: whom each is compared with, and in which variants.

A new family is one more `Family` in its own file and one more line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A config of a family.

    Attributes:
        name: of the variant.
        config: fields over the family's tiny config.
        legacy: entries of `config.json` as older versions of transformers wrote them, instead of `rope_parameters`.
        lengths: of the sequences whose logits are compared.
        thorough: whether the slower comparisons (cache, gradients, generation, files, sharding) run too.
        cache: whether a cached run equals an uncached one in transformers itself.
        generate: whether greedy tokens are compared.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    legacy: Mapping[str, Any] | None = None
    lengths: tuple[int, ...] = (24,)
    thorough: bool = False
    cache: bool = True
    generate: bool = False

    @property
    def padding(self) -> bool:
        """Whether padded rows are compared with the rows alone: where positions matter in a way of their own, too."""
        return self.thorough or len(self.lengths) > 1


@dataclass(frozen=True)
class Family:
    """A family and its counterpart.

    Attributes:
        name: its `model_type`.
        theirs: task → name of transformers' class.
        ours: task → name of our class.
        config: a tiny config that every variant starts from.
        variants: all configs compared.
        fields: field of the config → the change whose effect must be transformers' own.
        inert: fields without effect on a forward pass → the reason.
    """

    name: str
    theirs: Mapping[str, str]
    ours: Mapping[str, str]
    config: Mapping[str, Any]
    variants: tuple[Variant, ...]
    fields: Mapping[str, Mapping[str, Any]]
    inert: Mapping[str, str]

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)


def families() -> dict[str, Family]:
    from tests.models.dense import DENSE
    from tests.models.llama import LLAMA

    return {family.name: family for family in (LLAMA, *DENSE)}


FAMILIES = families()


def cases(want: str = "") -> list[tuple[str, str]]:
    """Return (family, variant) names; `want` names a flag that the variant must have."""
    return [(f.name, v.name) for f in FAMILIES.values() for v in f.variants if not want or getattr(v, want)]
