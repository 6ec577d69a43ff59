"""Adapters on eight devices: split as their layers' weights are, with the results of one device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from easydel import LoraConfig
from easydel.paths import flatten, named_variables
from easydel.sharding import create_mesh
from easydel.training.step import TrainStep
from tests.lora.tiny import arrays_of, assert_unharmed, randomise
from tests.quantization.tiny import IDS, llama, logits

MESH = (1, 2, 1, 4, 1)
SAME = 1e-6  # sums in another order: 2e-7 were seen
BATCH = {"input_ids": IDS, "labels": IDS}


def adapted(method: str | None, scan: bool, *, early: bool = False) -> Any:
    """Return a model with random adapters; `early`: it is sharded before it gets them."""
    model = llama(scan_layers=scan, num_hidden_layers=2 if scan else 1)
    if method:
        model.quantize(method, group_size=16)
    if early:
        model.shard_model(mesh=create_mesh(MESH))
    return randomise(model.apply_lora_to_layers(use_dora=True))


@pytest.mark.parametrize(
    ("method", "scan"),
    [
        (None, False),
        ("nf4", True),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param("nf4", False, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does(method: str | None, scan: bool) -> None:
    one = adapted(method, scan)
    want = logits(one)
    late = nnx.clone(one).shard_model(mesh=create_mesh(MESH))
    early = adapted(method, scan, early=True)
    for (path, left), right in zip(
        named_variables(late, nnx.LoRAParam, by_layer=False).items(),
        named_variables(early, nnx.LoRAParam, by_layer=False).values(),
        strict=True,
    ):
        assert left.get_value().sharding.is_equivalent_to(right.get_value().sharding, left.get_value().ndim), path
    for model in (late, early):
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=SAME)
    found = {path: v.get_value().sharding.spec for path, v in named_variables(late, nnx.LoRAParam).items() if not scan}
    if not scan:
        prefix = "model/layers/0/"
        assert found[f"{prefix}self_attn/q_proj/lora/a"] == PartitionSpec("fsdp", None)
        assert found[f"{prefix}self_attn/q_proj/lora/b"] == PartitionSpec(None, "tp")
        assert found[f"{prefix}self_attn/q_proj/lora/magnitude"] == PartitionSpec("tp")
        assert found[f"{prefix}mlp/down_proj/lora/a"] == PartitionSpec("tp", None)
        assert found[f"{prefix}mlp/down_proj/lora/b"] == PartitionSpec(None, "fsdp")
    told = {row.path: row.actual for row in late.explain_sharding(mesh=create_mesh(MESH)).parameters}
    for path, variable in named_variables(late, nnx.LoRAParam, by_layer=False).items():
        held = variable.get_value()
        assert jax.sharding.NamedSharding(late.mesh, told[path]).is_equivalent_to(held.sharding, held.ndim), path
        named = flatten(late._named_shardings(None, late.mesh), by_layer=False)[path]
        assert named.is_equivalent_to(held.sharding, held.ndim), path
    moved = flatten(late._apply_sharding_fns(one.params, None, late.mesh), by_layer=False)
    for path, variable in named_variables(late, nnx.LoRAParam, by_layer=False).items():
        assert moved[path].sharding.is_equivalent_to(variable.get_value().sharding, moved[path].ndim), path


def test_training_swapping_and_folding_on_eight_devices() -> None:
    one = llama(num_hidden_layers=1).apply_lora_to_layers(lora_dropout=0.1)
    eight = nnx.clone(one).shard_model(mesh=create_mesh(MESH))
    finals = []
    for model in (one, eight):
        step = TrainStep(model.to_state(optax.sgd(0.1)))
        for _ in range(2):
            step(BATCH)
        finals.append(step.state)
    for (path, want), got in zip(
        flatten(finals[0].trainable_params).items(), flatten(finals[1].trainable_params).values(), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=SAME, err_msg=path)
    trained = finals[1].model
    want = logits(trained)
    before = arrays_of(trained)
    trained.merge_adapter()
    np.testing.assert_allclose(logits(trained), want, rtol=0, atol=SAME)
    trained.unmerge_adapter()
    assert_unharmed(trained, before)
    trained.add_adapter("second", LoraConfig(dropout=0.1)).set_adapter("second")
    np.testing.assert_allclose(logits(trained), logits(llama(num_hidden_layers=1)), rtol=0, atol=SAME)
    trained.set_adapter("default")
    np.testing.assert_array_equal(logits(trained), want)
    kernel = trained.model.layers[0].self_attn.q_proj.kernel.get_value().sharding
    trained.merge_and_unload()
    assert trained.model.layers[0].self_attn.q_proj.kernel.get_value().sharding == kernel
    np.testing.assert_allclose(logits(trained), want, rtol=0, atol=SAME)


def test_spreading_and_gathering_take_adapters_along() -> None:
    model = randomise(llama(num_hidden_layers=1).apply_lora_to_layers())
    want = logits(model)
    mesh = create_mesh((1, 8, 1, 1, 1))
    model.fully_shard(mesh)
    assert not model.model.layers[0].self_attn.q_proj.lora.a.get_value().sharding.is_fully_replicated
    np.testing.assert_allclose(logits(model), want, rtol=0, atol=SAME)
    model.fully_gather(mesh)
    np.testing.assert_allclose(logits(model), want, rtol=0, atol=SAME)
