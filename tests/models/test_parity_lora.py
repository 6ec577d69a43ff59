"""Every family of the table: adapters change nothing at first, fold into the weights, and split over devices."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from flax import nnx

from easydel.sharding import create_mesh
from tests.lora.tiny import randomise
from tests.models.pairs import Jitted, close, equal, pair
from tests.models.table import cases

SAME = 1e-5  # the same sums, arranged otherwise


@functools.cache
def adapted(family: str, variant: str) -> Any:
    """Return a model with adapters on all linear layers, the outputs of step 0, and those of random numbers."""
    case = pair(family, variant)
    model, inputs = nnx.clone(case.ours).apply_lora_to_layers(), case.inputs(case.ids(2, 9))
    first = Jitted(model)(**inputs).logits
    return randomise(model), inputs, first, Jitted(model)(**inputs).logits


@pytest.mark.proof("lora_identity")
@pytest.mark.parametrize(("family", "variant"), cases("lora_identity"))
def test_new_adapters_change_nothing(family: str, variant: str) -> None:
    _, inputs, first, trained = adapted(family, variant)
    want = pair(family, variant).run(**inputs).logits
    equal(first, want)
    assert abs(trained - want).max() > 1e-3 * abs(want).max()


@pytest.mark.proof("lora_merged")
@pytest.mark.parametrize(("family", "variant"), cases("lora_merged"))
def test_merged_adapters_compute_what_adapters_compute(family: str, variant: str) -> None:
    model, inputs, _, want = adapted(family, variant)
    close(Jitted(nnx.clone(model).merge_and_unload())(**inputs).logits, want, SAME)


@pytest.mark.proof("lora_sharding")
@pytest.mark.parametrize(("family", "variant"), cases("lora_sharding"))
@pytest.mark.filterwarnings("ignore:.*mesh axis.* dropped:UserWarning")
def test_adapters_on_eight_devices_compute_what_one_computes(family: str, variant: str) -> None:
    model, inputs, _, want = adapted(family, variant)
    sharded = nnx.clone(model).shard_model(mesh=create_mesh((1, 2, 1, 4, 1)))
    close(Jitted(sharded)(**inputs).logits, want, SAME)
