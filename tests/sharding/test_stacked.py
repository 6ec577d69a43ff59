"""Layers stored stacked (`scan_layers=True`): explained and created as they are stored, by each layer's rules."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from easydel import LlamaConfig, LlamaForCausalLM, ShardingError
from easydel.paths import flatten, named_variables
from easydel.sharding import create_arrays
from tests.sharding.held import bits, family, held, live, mesh_named, one_of_a_kind

P = PartitionSpec
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ mesh axis\(es\) dropped")
UP = "model/layers/0:4:1/mlp/up_proj/kernel"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}


def llama(*, scan: bool = True):
    return LlamaConfig(**SIZES, num_attention_heads=4, scan_layers=scan)


def lazy(*, scan: bool = True, mesh=None, rules=None):
    return LlamaForCausalLM.lazy_init(llama(scan=scan), mesh_named("tp") if mesh is None else mesh, rules)


# Layers that are stacked two by two; two stacks.
@pytest.mark.parametrize(
    "name", ["gemma2", "t5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2"))]
)
def test_created_in_place_they_are_those_of_layers_one_by_one(name):
    cls, config = family(name)
    config.scan_layers = True
    mesh, keys, same_keys = mesh_named("tp"), nnx.Rngs(7), nnx.Rngs(7)
    model = cls.sharded_init(config, mesh, rngs=keys)
    alone = cls(family(name)[1], rngs=same_keys)
    got, want = named_variables(model), named_variables(alone)
    assert any(":" in path for path in named_variables(model, by_layer=False))
    assert got.keys() == want.keys()
    for path, variable in want.items():
        assert got[path].dtype == variable.dtype
        np.testing.assert_array_equal(bits(got[path].get_value()), bits(variable.get_value()), err_msg=path)
    np.testing.assert_array_equal(bits(keys()), bits(same_keys()))
    said = model.explain_sharding()
    assert held(model) == said.bytes_per_device
    for path, variable in named_variables(model, by_layer=False).items():
        array = variable.get_value()
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, said[path].actual), array.ndim), path
        assert said[path].bytes == array.nbytes
        assert (said[path].shape, said[path].dtype) == (array.shape, str(array.dtype))
    one_by_one = alone.explain_sharding(mesh=mesh)
    assert (said.bytes, said.rules) == (one_by_one.bytes, one_by_one.rules)
    assert said.bytes_per_device == one_by_one.bytes_per_device


@pytest.mark.parametrize("name", one_of_a_kind())
def test_a_lazy_model_has_one_row_a_stack(name):
    cls, config = family(name)
    config.scan_layers = True
    gc.collect()
    before = live()
    model = cls.lazy_init(config, mesh_named("tp"))
    assert live() == before
    said = model.explain_sharding()
    rows = [row.path for row in (*said.parameters, *said.state)]
    assert sorted(rows) == sorted(named_variables(model, by_layer=False))
    assert any(":" in path for path in rows)
    for path, leaf in flatten(model.graphtree_params_shape, by_layer=False).items():
        assert leaf.sharding == NamedSharding(mesh_named("tp"), said[path].actual), path


def test_the_layers_axis_stays_whole():
    row = lazy().explain_sharding()[UP]
    assert (row.shape, row.requested, row.actual) == ((4, 32, 64), P(None, "fsdp", "tp"), P(None, "fsdp", "tp"))
    assert (row.bytes, row.bytes_per_device) == (4 * 32 * 64 * 4, 4 * 32 * 64 * 4 // 8)
    assert UP in str(lazy().explain_sharding())
    assert lazy(mesh={"fsdp": 16, "tp": 2}).explain_sharding()[UP].bytes_per_device == 4 * 32 * 64 * 4 // 32


def test_rules_that_name_layers_are_accounted_for_layer_by_layer():
    rules = [("layers/0/.*kernel", P("fsdp")), (r"layers/\d/.*kernel", P("fsdp")), ("layers/9", P()), (".*", P())]
    said = lazy(rules=rules).explain_sharding(rules)
    assert said.rules == lazy(scan=False, rules=rules).explain_sharding(rules).rules
    assert [(use.chosen, use.matching) for use in said.rules[:3]] == [(7, 7), (21, 28), (0, 0)]
    assert said[UP].rule == 0


def test_errors_name_the_rule_as_it_was_written():
    with pytest.raises(
        ShardingError, match=r"0:4:1/mlp/up_proj/kernel: rules\[0\] \('up_proj', P\w*\('xy',?\)\) names"
    ):
        lazy(rules=[("up_proj", P("xy")), (".*", P())])
    with pytest.raises(ShardingError, match=r"layers/3/mlp/up_proj/kernel \(32, 64\): no rule matches"):
        lazy(rules=[("layers/[0-2]", P()), ("embed|norm|head", P())])
    with pytest.raises(
        ShardingError, match=r"layers/0/mlp/up.*: gets rules\[0\].*layers/1/.* gets rules\[1\].*scan_layers"
    ):
        lazy(rules=[("layers/0/mlp", P("tp")), (".*", P())])


def test_arrays_are_stacked_where_they_lie():
    split, along = NamedSharding(mesh_named("tp"), P(None, "tp")), NamedSharding(mesh_named("tp"), P("tp"))

    def make():
        drawn = [jax.random.normal(key, (8, 8)) for key in jax.random.split(jax.random.key(0), 4)]
        rows = [jax.random.normal(key, (8,)) for key in jax.random.split(jax.random.key(1), 4)]
        return [jax.numpy.stack(drawn), jax.numpy.stack(drawn, axis=1), jax.numpy.stack(drawn), jax.numpy.stack(rows)]

    shardings = [split, split, along, split]
    for got, want, sharding in zip(create_arrays(make, shardings), make(), shardings, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding == sharding
