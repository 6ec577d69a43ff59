"""Every field of a config does here what it does in transformers, or is named with the reason why not."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from flax import nnx

import easydel
from tests.models.changes import Changes
from tests.models.pairs import Pair, same_outputs
from tests.models.table import FAMILIES, Family, cases


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_table_names_every_field(name: str) -> None:
    family = FAMILIES[name]
    cls = getattr(transformers, family.class_name(family.main_task, "theirs")).config_class
    known = {f.name for f in dataclasses.fields(cls)}
    assert known <= {*family.fields, *family.inert}, known - {*family.fields, *family.inert}
    assert not set(family.fields) & set(family.inert)


@pytest.mark.proof("fields")
@pytest.mark.parametrize(("family", "variant"), cases("fields"))
def test_changed_fields_have_transformers_effect(family: str, variant: str) -> None:
    changes = Changes(family, variant)
    inputs, groups = changes.inputs(), changes.groups()
    assert sorted(field for group in groups for field in group) == sorted(changes.fields)
    for group in groups:
        for field in group:
            assert changes.shows(field, group), f"{field}: a change without effect tests nothing"
        case = changes.pair(group)
        for key, value in changes.of(group).items():
            assert getattr(case.ours.config, key) == value
        try:
            compare(case, inputs)
        except AssertionError as error:
            wrong = [field for field in group if len(group) > 1 and fails(changes.pair((field,)), inputs)]
            raise AssertionError(f"changed at once: {group}; wrong alone: {wrong or 'none of them'}") from error


def compare(case: Pair, inputs: dict[str, Any]) -> None:
    got = case.run(**inputs)
    compared = same_outputs(got, case.theirs(**inputs), 1e-4)
    assert set(got.keys()) == set(compared), "an output that transformers does not give"


def fails(case: Pair, inputs: dict[str, Any]) -> bool:
    try:
        compare(case, inputs)
    except AssertionError:
        return True
    return False


@pytest.mark.proof("fresh")
@pytest.mark.parametrize(("family", "variant"), cases("fresh"))
def test_fresh_weights_follow_initializer_range(family: str, variant: str) -> None:
    entry = FAMILIES[family]
    for deviation in (0.02, 0.3):
        config = {**entry.config, **entry.variant(variant).config, entry.deviation: deviation}
        ours, theirs = ([fresh(entry, side, config, seed) for seed in range(4)] for side in ("ours", "theirs"))
        assert ours[0].keys() == theirs[0].keys()
        for name in theirs[0]:
            got, want = (torch.stack([weights[name] for weights in models]) for models in (ours, theirs))
            if want.std() == 0:
                assert got.unique().tolist() == want.unique().tolist(), name
            else:
                assert abs(float(got.std() / want.std()) - 1) < 0.1, name


def fresh(family: Family, side: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return new weights under transformers' names."""
    config = copy.deepcopy(config)  # Phi3Config writes into the dict it is given, which the families share
    if side == "ours":
        cls = getattr(easydel, family.class_name(family.main_task, "ours"))
        return cls(cls.config_class(**config), rngs=nnx.Rngs(seed)).to_torch()
    torch.manual_seed(seed)
    cls = getattr(transformers, family.class_name(family.main_task, "theirs"))
    return cls(cls.config_class(**config)).state_dict()


REFUSED = [(family, *case) for family, _ in cases("refused") for case in FAMILIES[family].refused]


@pytest.mark.proof("refused")
@pytest.mark.parametrize(("family", "changes", "match"), REFUSED)
def test_what_is_not_supported_is_refused(family: str, changes: dict[str, Any], match: str) -> None:
    entry = FAMILIES[family]
    cls = getattr(easydel, entry.class_name(entry.main_task, "ours"))
    with pytest.raises((easydel.UnsupportedError, ValueError), match=match):
        cls(cls.config_class(**copy.deepcopy({**entry.config, **changes})))
