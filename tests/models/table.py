"""The table of families: whom each is compared with, in which variants, and what is proved of them.

A new family is one more `Family` in its own file and one more line in `families()`. The tests ask this table what to
run; what a family is not held to stands here with its reason (`tests/models/test_table.py` sees to that).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from tests.models.proofs import PROOFS

SUFFIXES = {
    "base": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
"""Task → what transformers' class for it is called after the family's prefix, as a rule."""

SAMPLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "mamba2", "mixtral", "bert", "t5")
"""Families that between them have every kind of layer.

What shared code does, whatever the family, is proved of these in every run, and of the others in the slow group.
"""


@dataclass(frozen=True)
class Variant:
    """A config of a family.

    Attributes:
        name: of the variant.
        config: fields over the family's tiny config.
        legacy: entries of `config.json` as older versions of transformers wrote them, instead of `rope_parameters`.
        lengths: of the sequences whose outputs are compared.
        thorough: whether it is held to the proofs of thorough variants too.
        proofs: further proofs it is held to.
        excused: proofs it is not held to although its place in the table says so → the reason.
        attention: which of transformers' ways to compute attention it is compared with.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    legacy: Mapping[str, Any] | None = None
    lengths: tuple[int, ...] = (24,)
    thorough: bool = False
    proofs: Iterable[str] = ()
    excused: Mapping[str, str] = field(default_factory=dict)
    attention: str = "eager"


@dataclass(frozen=True)
class Family:
    """A family and its counterpart.

    Attributes:
        name: its `model_type`.
        theirs: task → name of transformers' class; the tasks are those of the registry.
        config: a tiny config that every variant starts from.
        variants: all configs compared; the first is the main one.
        fields: field of the config → the change whose effect must be transformers' own.
        inert: fields without effect on a forward pass → the reason.
        main_task: the task in which everything is proved that is not said of another task.
        ours: task → name of our class where it differs from transformers'.
        dropout: the fields that hold rates of dropout.
        new_in_base: patterns of what the model without a head has and the main task's checkpoint has not.
        cancelled: ends of the names, in transformers, of biases whose gradient is zero in exact arithmetic: of keys
            that are not rotated. Such a bias adds the same to all of a query's products, and softmax does not see that.
        excused: proofs the family is not held to → the reason.
        counts_padding: whether transformers' positions count padding, so that it must be told those of the tokens.
        deviation: the field that new weights' deviations are proportional to.
        factors: end of a parameter's name in transformers → what its random numbers are multiplied by, where the family
            needs them smaller than others do.
        reads_padding: tasks whose loss reads what a model makes of padding, which is compared on rows without any → the
            reason.
        pads_right: whether transformers' positions count padding and cannot be told, so that prompts that both are
            given must be padded right.
        refused: configs that must be refused when a model is built, with the message's pattern.
    """

    name: str
    theirs: Mapping[str, str]
    config: Mapping[str, Any]
    variants: tuple[Variant, ...]
    fields: Mapping[str, Mapping[str, Any]]
    inert: Mapping[str, str]
    main_task: str = "causal-lm"
    ours: Mapping[str, str] = field(default_factory=dict)
    dropout: tuple[str, ...] = ("attention_dropout",)
    new_in_base: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = ()
    excused: Mapping[str, str] = field(default_factory=dict)
    counts_padding: bool = False
    deviation: str = "initializer_range"
    factors: Mapping[str, float] = field(default_factory=dict)
    reads_padding: Mapping[str, str] = field(default_factory=dict)
    pads_right: bool = False
    refused: tuple[tuple[Mapping[str, Any], str], ...] = ()

    @property
    def main(self) -> Variant:
        """The variant that stands for the family where one is enough."""
        return self.variants[0]

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def tiny(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the main variant's fields with changes: a copy, since `Phi3Config` writes into what it is given."""
        return copy.deepcopy({**self.config, **self.main.config, **changes})

    def class_name(self, task: str, side: Literal["ours", "theirs"]) -> str:
        """Return the name of the class that serves a task, here or in transformers."""
        return self.ours.get(task, self.theirs[task]) if side == "ours" else self.theirs[task]

    @property
    def others(self) -> tuple[str, ...]:
        """The tasks beside the main one whose classes have a loss."""
        return tuple(task for task in self.theirs if task not in ("base", "embedding", self.main_task))

    def excuse(self, proof: str) -> str | None:
        """Return why the family is not held to a proof; `None` if it is."""
        needed = PROOFS[proof].tasks
        if needed and not set(needed) & set(self.theirs):
            return f"it has no class for {' or '.join(needed)}"
        if PROOFS[proof].of_others and not self.others:
            return "its only other class is the base model: the proof of base"
        return self.excused.get(proof)

    def held_to(self, proof: str) -> tuple[Variant, ...]:
        """Return the variants in which a proof is run."""
        if self.excuse(proof) is not None:
            return ()
        on = PROOFS[proof].on
        return tuple(
            v
            for v in self.variants
            if (on == "every" or (on == "thorough" and v.thorough) or v is self.main or proof in v.proofs)
            and proof not in v.excused
        )


def families() -> dict[str, Family]:
    from tests.models.bart import BART
    from tests.models.bert import BERT
    from tests.models.dense import DENSE
    from tests.models.dense_mid import DENSE_MID
    from tests.models.dense_more import DENSE_MORE
    from tests.models.dense_new import DENSE_NEW
    from tests.models.encoders import ENCODERS
    from tests.models.gemma import GEMMAS
    from tests.models.gpt2 import GPT2
    from tests.models.hybrids import HYBRIDS
    from tests.models.latent import LATENT
    from tests.models.llama import LLAMA
    from tests.models.mamba2 import MAMBA2
    from tests.models.mixtral import MIXTRAL
    from tests.models.mixtures import MIXTURES
    from tests.models.older import OLDER
    from tests.models.selective import SELECTIVES
    from tests.models.t5 import T5

    varied = (*DENSE, *DENSE_MORE, *GEMMAS, *MIXTURES, *DENSE_NEW, *OLDER, *DENSE_MID, *LATENT, *HYBRIDS, *SELECTIVES)
    return {family.name: family for family in (LLAMA, *varied, GPT2, MAMBA2, MIXTRAL, BERT, T5, *ENCODERS, BART)}


FAMILIES = families()


def quick(family: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test that is slow for families outside `SAMPLE`."""
    return [] if family in SAMPLE else [pytest.mark.slow]


def sampled() -> list[Any]:
    """Return every family's name as a test's parameter, with its marks."""
    return [pytest.param(name, marks=quick(name)) for name in FAMILIES]


def cases(proof: str) -> list[tuple[str, str]]:
    """Return the (family, variant) names that are held to a proof."""
    return [(family.name, variant.name) for family in FAMILIES.values() for variant in family.held_to(proof)]
