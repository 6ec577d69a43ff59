"""base_module.md: Basic Structure, Model Information, Parameter Access, Graph Operations, Best Practices 1-2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import EasyDeLBaseModule
from easydel.infra.mixins.bridge import EasyBridgeMixin
from easydel.infra.mixins.generation import EasyGenerationMixin
from easydel.infra.mixins.operation_cache import OperationCacheMixin
from easydel.paths import flatten
from tests.spec.conftest import arrays, assert_same


def test_class_hierarchy():
    bases = (nnx.Module, EasyGenerationMixin, EasyBridgeMixin, OperationCacheMixin)
    assert EasyDeLBaseModule.__bases__ == bases


def test_model_information(case):
    model = case.cls(case.config, rngs=nnx.Rngs(0))
    assert model.config is case.config
    assert model.model_type == ("llama" if case.name == "llama" else "my-model")
    assert model.model_task == ("causal-lm" if case.name == "llama" else "base")
    assert model.mesh is model.config.mesh
    assert dict(model.mesh.shape) == {"dp": 1, "fsdp": 8, "ep": 1, "tp": 1, "sp": 1}


def test_params_are_a_nested_dict_of_the_arrays_themselves(model):
    params = model.params
    assert type(params) is dict
    variables = {id(v.get_value()) for v in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=_is_variable)}
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(variables)
    assert all(isinstance(leaf, jax.Array) and id(leaf) in variables for leaf in leaves)


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def test_shapes_mirror_the_parameters(model):
    params = model.params
    shapes = model.graphtree_params_shape
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    for path, leaf in flatten(shapes).items():
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype) == (flatten(params)[path].shape, flatten(params)[path].dtype), path


def test_shapes_carry_the_sharding_of_a_sharded_model(case, model):
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(model.graphtree_params_shape))
    model.shard_model(mesh=case.mesh)
    held = flatten(model.params)
    for path, leaf in flatten(model.graphtree_params_shape).items():
        assert leaf.sharding == held[path].sharding, path


def test_split_and_merge_module(case, model, input_ids):
    expected = case.logits(model, input_ids)
    graphdef, state = model.split_module()
    merged = model.merge_module(graphdef, state)
    assert merged is not model
    assert type(merged) is case.cls
    np.testing.assert_array_equal(case.logits(merged, input_ids), expected)
    on_the_class = case.cls.merge_module(graphdef, state)
    np.testing.assert_array_equal(case.logits(on_the_class, input_ids), expected)


def test_a_merged_module_is_a_new_one(model):
    """Changing it must not change the model it was split from."""
    graphdef, state = model.split_module()
    model.merge_module(graphdef, state).half()
    assert model.module_dtype == jnp.float32


def test_graph_components(case, model, input_ids):
    graphdef = model.graphdef
    graphstate = model.graphstate
    graphother = model.graphother
    merged = nnx.merge(graphdef, graphstate)
    np.testing.assert_array_equal(case.logits(merged, input_ids), case.logits(model, input_ids))
    assert {*flatten(graphother)} == {*flatten(graphstate)} - {*flatten(model.params)}
    assert hash(graphdef) == hash(case.fresh().graphdef)
    assert graphdef == case.fresh().graphdef


@pytest.mark.parametrize("kind", ["dict", "state"])
def test_split_and_merge_params(model, kind):
    params_dict = model.split_params_dict()
    params_state = model.split_params()
    assert type(params_dict) is dict
    assert isinstance(params_state, nnx.State)
    assert_same(params_state, params_dict)
    doubled = {"dict": params_dict, "state": params_state}[kind]
    doubled = jax.tree.map(lambda x: 2 * x, doubled)
    before = arrays(model.params)
    merged = model.merge_params_dict(doubled) if kind == "dict" else model.merge_params(doubled)
    assert merged is model
    for path, value in arrays(model.params).items():
        np.testing.assert_array_equal(value, 2 * before[path], err_msg=path)


@pytest.mark.parametrize("kind", ["dict", "state"])
def test_split_params_keep_their_values_when_the_model_changes(model, kind):
    """What was split off can be put back: it is a view of the arrays, not of the model's variables."""
    before = arrays(model.params)
    kept = model.split_params_dict() if kind == "dict" else model.split_params()
    model.merge_params_dict(jax.tree.map(jnp.zeros_like, model.params))
    assert not any(value.any() for value in arrays(model.params).values())
    (model.merge_params_dict if kind == "dict" else model.merge_params)(kept)
    assert_same(model.params, before)


def test_initialise_with_rngs(case):
    model = case.cls(config=case.config, rngs=nnx.Rngs(0))
    assert_same(model.params, case.master.params)
    other = case.cls(config=case.config, rngs=nnx.Rngs(1))
    assert any((arrays(other.params)[path] != value).any() for path, value in arrays(model.params).items())


def test_compute_and_storage_dtypes(case, input_ids):
    model = case.cls(
        config=case.config,
        dtype=jnp.bfloat16,  # Computation dtype
        param_dtype=jnp.float32,  # Parameter storage dtype
        rngs=nnx.Rngs(0),
    )
    logits = case.logits(model, input_ids)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: products of a few layers stay within a few percent of the largest logit
    expected = case.logits(case.master, input_ids)
    np.testing.assert_allclose(np.asarray(logits, np.float32), expected, atol=0.05 * np.abs(expected).max())
