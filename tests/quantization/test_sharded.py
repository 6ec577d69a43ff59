"""Quantized models on eight devices: where codes and scales lie, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from easydel import MixtralConfig, MixtralForCausalLM
from easydel.quantization import quantized_layers
from easydel.sharding import create_mesh
from tests.quantization.tiny import IDS, llama, logits
from tests.spec.user_models import MyModel, MyModelConfig


@pytest.fixture(scope="module")
def mesh():
    return create_mesh((1, 4, 1, 2, 1))


SLOW = [("nf4", False), ("8bit", False), ("8bit", True), ("a8q", False), ("a8q", True)]


@pytest.mark.parametrize(
    ("method", "scan"), [("nf4", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_eight_devices_give_what_one_gives(method, scan, mesh):
    fields = {"scan_layers": scan, "num_hidden_layers": 2 if scan else 1}
    model = llama(**fields).quantize(method, group_size=16)
    exact = logits(model)
    model.shard_model(mesh=mesh)
    # Partial sums are added in another order; and an activation halfway between two codes may then round to the other
    # one, a step of 1/127 of the largest, so that logits of size 0.4 change in the third digit.
    close = 5e-3 if method == "a8q" else 1e-5
    np.testing.assert_allclose(logits(model), exact, atol=close)
    other = llama(**fields).shard_model(mesh=mesh).quantize(method, group_size=16)
    for (path, one), two in zip(quantized_layers(model).items(), quantized_layers(other).values(), strict=True):
        lead = (None,) if "0:2:1" in path else ()
        spec = ("fsdp", "tp") if path.endswith(("o_proj", "down_proj")) else ("tp", "fsdp")
        for name, variable in one.weight_variables().items():
            array, same = variable.get_value(), two.weight_variables()[name].get_value()
            assert array.sharding.spec == PartitionSpec(*lead, *spec), path
            assert array.sharding.is_equivalent_to(same.sharding, array.ndim), path
            np.testing.assert_array_equal(array, same)
    np.testing.assert_allclose(logits(other), exact, atol=close)
    other.gather_model()
    np.testing.assert_array_equal(logits(other), exact)
    other.fully_shard(mesh).dequantize()
    assert not other.is_quantized


def test_scales_are_split_by_what_divides(mesh):
    model = (
        llama(num_hidden_layers=1).quantize("8bit").shard_model(mesh=mesh)
    )  # one group a row of 64 inputs, two of 128
    up, down = (getattr(model.model.layers[0].mlp, name) for name in ("up_proj", "down_proj"))
    assert up.codes.get_value().sharding.spec == PartitionSpec("tp", "fsdp")
    assert up.scales.get_value().sharding.spec == PartitionSpec("tp", None)
    assert down.scales.get_value().sharding.spec == PartitionSpec("fsdp", "tp")


def test_explained_as_it_is_placed(mesh):
    model = llama().quantize("nf4", group_size=16)
    explained = {row.path: row for row in model.explain_sharding(mesh=mesh).parameters}
    model.shard_model(mesh=mesh)
    layer = model.model.layers[0].mlp.up_proj
    for name, variable in layer.weight_variables().items():
        row = explained[f"model/layers/0/mlp/up_proj/{name}"]
        assert row.actual == variable.get_value().sharding.spec
        assert row.bytes_per_device == variable.get_value().addressable_shards[0].data.nbytes
        assert "up" in row.pattern


def test_experts_and_user_models_without_rules(mesh):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    experts = create_mesh((1, 2, 2, 2, 1))
    model = MixtralForCausalLM(config).quantize("8bit", group_size=8)
    exact = logits(model)
    model.shard_model(mesh=experts)
    codes = model.model.layers[0].mlp.experts.up_proj.codes.get_value()
    assert codes.sharding.spec[0] == "ep"
    np.testing.assert_allclose(logits(model), exact, atol=1e-5)
    mine = MyModel(MyModelConfig(vocab_size=64, hidden_size=16), rngs=nnx.Rngs(0)).quantize("nf4", group_size=4)
    exact = logits(mine, IDS)
    mine.shard_model(mesh=mesh)
    assert mine.up.codes.get_value().sharding.spec == PartitionSpec("tp", "fsdp")
    np.testing.assert_allclose(logits(mine, IDS), exact, atol=1e-5)
