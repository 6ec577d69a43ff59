"""Every field of a config does here what it does in transformers, or is named with the reason why not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from flax import nnx

import easydel
from tests.models.pairs import pair, same_outputs
from tests.models.table import FAMILIES, Family, cases

PERTURBED = [(name, variant, field) for name, variant in cases("fields") for field in FAMILIES[name].fields]
NOT_OF_LOGITS = {
    "output_hidden_states": "of outputs",
    "output_attentions": "of outputs",
    "output_router_logits": "of outputs",
    "pad_token_id": "of gradients: test_padding_token_s_embedding_is_not_trained",
    "partial_rotary_factor": "transformers' Llama does not read it, so neither does ours",
}
ALSO_OF_LOGITS = {("roberta", "pad_token_id"): "its positions begin after it"}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_table_names_every_field(name: str) -> None:
    family = FAMILIES[name]
    cls = getattr(transformers, family.class_name(family.main_task, "theirs")).config_class
    known = {f.name for f in dataclasses.fields(cls)}
    assert known <= {*family.fields, *family.inert}, known - {*family.fields, *family.inert}
    assert not set(family.fields) & set(family.inert)


@pytest.mark.proof("fields")
@pytest.mark.parametrize(("family", "variant", "field"), PERTURBED)
def test_a_changed_field_has_transformers_effect(family: str, variant: str, field: str) -> None:
    changes = dict(FAMILIES[family].fields[field])
    plain, case = pair(family, variant), pair(family, variant, **changes)
    for key, value in changes.items():
        assert getattr(case.ours.config, key) == value
    ids = plain.ids(2, 40)
    ids[:, 5] = 3
    inputs = case.inputs(ids)
    want = case.theirs(**inputs)
    effect = differs(want.logits, plain.theirs(**inputs).logits)
    expected = field not in NOT_OF_LOGITS or (family, field) in ALSO_OF_LOGITS
    assert effect == expected, "a change without effect tests nothing"
    got = case.run(**inputs)
    compared = same_outputs(got, want, 1e-4)
    assert set(got.keys()) == set(compared), "an output that transformers does not give"


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or float((one - other).abs().max() / other.abs().max()) > 1e-3


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
        cls(cls.config_class(**{**entry.config, **changes}))
