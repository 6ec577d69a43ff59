"""Every field of a config does here what it does in transformers, or is named with the reason why not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import transformers

import easydel
from easydel.paths import flatten
from tests.models.pairs import array, close, pair
from tests.models.table import FAMILIES

PERTURBED = [(name, field) for name, family in FAMILIES.items() for field in family.fields]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_table_names_every_field(name: str) -> None:
    family = FAMILIES[name]
    known = {f.name for f in dataclasses.fields(getattr(transformers, family.theirs["causal-lm"]).config_class)}
    assert known <= {*family.fields, *family.inert}, known - {*family.fields, *family.inert}
    assert not set(family.fields) & set(family.inert)


@pytest.mark.parametrize(("name", "field"), PERTURBED)
def test_a_changed_field_has_transformers_effect(name: str, field: str) -> None:
    family = FAMILIES[name]
    plain, case = pair(name, "gqa"), pair(name, "gqa", fields=json.dumps(dict(family.fields[field])))
    for key, value in family.fields[field].items():
        assert getattr(case.ours.config, key) == value
    ids = plain.ids(2, 40)
    ids[:, 5] = 3
    want = case.theirs(input_ids=ids)
    got = case.ours(input_ids=ids) if field.startswith("output_") else case.run(input_ids=ids)
    close(got.logits, want.logits, 1e-4)
    for output in ("hidden_states", "attentions"):
        assert (getattr(got, output) is None) == (getattr(want, output, None) is None), output


def test_fresh_weights_follow_initializer_range() -> None:
    config = {**FAMILIES["llama"].config, "hidden_size": 64, "intermediate_size": 128}
    for deviation in (0.02, 0.3):
        model = easydel.LlamaForCausalLM(easydel.LlamaConfig(**config, initializer_range=deviation))
        for path, leaf in flatten(model.params).items():
            if not path.endswith("scale"):
                assert abs(np.std(array(leaf)) / deviation - 1) < 0.1, path


def test_unknown_names_raise() -> None:
    config = FAMILIES["llama"].config
    with pytest.raises(easydel.UnsupportedError, match="not supported"):
        easydel.LlamaForCausalLM(easydel.LlamaConfig(**config, hidden_act="snake"))
    rope = {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    with pytest.raises((easydel.UnsupportedError, ValueError), match="axial"):
        easydel.LlamaForCausalLM(easydel.LlamaConfig(**{**config, **rope}))
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        easydel.LlamaForCausalLM(easydel.LlamaConfig(**{**config, "num_key_value_heads": 3}))
