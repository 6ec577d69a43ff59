"""base_module.md: Automatic Sharding, Manual Sharding Control, Full Sharding Operations, Dtype Management."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from easydel.paths import flatten
from tests.spec.conftest import arrays, assert_same

KERNEL = {"llama": "model/layers/0/self_attn/q_proj/kernel", "my_model": "up/kernel", "mixing": "layers/1/kernel"}


def _on_one_device(model) -> bool:
    return all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in jax.tree.leaves(model.params))


def test_shard_model_and_gather_model(case, model, input_ids):
    expected = case.logits(model, input_ids)
    assert model.shard_model(partition_rules=None, mesh=case.mesh) is model
    assert model.mesh == case.mesh
    kernel = flatten(model.params)[KERNEL[case.name]]
    assert kernel.sharding == NamedSharding(case.mesh, PartitionSpec("fsdp", "tp"))
    assert kernel.addressable_shards[0].data.size * case.mesh.size == kernel.size
    # Partial sums over devices are added in another order than on one
    np.testing.assert_allclose(case.logits(model, input_ids), expected, atol=1e-5)
    assert model.gather_model() is model
    assert _on_one_device(model)
    assert model.mesh == case.mesh
    np.testing.assert_array_equal(case.logits(model, input_ids), expected)


def test_shard_model_without_arguments_uses_the_config(case, model):
    model.shard_model(
        partition_rules=None,  # Uses config.get_partition_rules() if None
        mesh=None,  # Uses config.mesh if None
    )
    assert model.mesh == case.config.mesh
    held = flatten(model.params)[KERNEL[case.name]]
    assert held.sharding.is_equivalent_to(NamedSharding(case.config.mesh, PartitionSpec("fsdp", None)), 2)


def test_sharding_again_and_elsewhere(case, model):
    before = arrays(model.params)
    model.shard_model(mesh=case.mesh).shard_model().shard_model([(".*", PartitionSpec())], case.mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params))
    assert_same(model.params, before)


def test_manual_sharding_control(case, model):
    mesh = case.mesh
    rules = model._get_partition_rules()
    specs = model._specs_sharding(rules)
    named_shardings = model._named_shardings(rules, mesh)
    assert type(specs) is dict
    assert {*flatten(specs)} == {*flatten(named_shardings)} == {*flatten(model.params)}
    assert flatten(specs)[KERNEL[case.name]] == PartitionSpec("fsdp", "tp")
    assert flatten(specs) == flatten(model._specs_sharding())
    for path, sharding in flatten(named_shardings).items():
        assert sharding == NamedSharding(mesh, flatten(specs)[path]), path

    tree, partition_rules = model.params, rules
    sharded = model._apply_sharding_fns(
        tree,
        partition_rules,
        mesh,
        is_gather=False,  # True to gather, False to shard
    )
    assert_same(sharded, tree)
    assert _on_one_device(model), "the model itself is not moved"
    for path, leaf in flatten(sharded).items():
        assert leaf.sharding == flatten(named_shardings)[path], path
    gathered = model._apply_sharding_fns(sharded, partition_rules, mesh, is_gather=True)
    assert all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in jax.tree.leaves(gathered))
    assert_same(gathered, tree)


def test_fully_shard_and_fully_gather(case, model):
    before = arrays(model.params)
    assert model.fully_shard(mesh=case.mesh) is model
    for path, leaf in flatten(model.params).items():
        assert leaf.addressable_shards[0].data.size * case.mesh.size == leaf.size, path
    assert_same(model.params, before)
    assert model.fully_gather(mesh=case.mesh) is model
    assert _on_one_device(model)
    assert_same(model.params, before)


def test_full_sharding_without_a_mesh(case, model):
    model.fully_shard(mesh=None)
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in jax.tree.leaves(model.params))
    model.fully_gather(mesh=None)
    assert _on_one_device(model)


def test_sharding_functions(case, model):
    rules, mesh = model._get_partition_rules(), case.mesh
    shard_fns = model._shard_fns(rules, mesh)
    gather_fns = model._gather_fns(rules, mesh)
    sharded = jax.tree.map(lambda fn, x: fn(x), shard_fns, model.params)
    for path, leaf in flatten(sharded).items():
        assert leaf.sharding == flatten(model._named_shardings(rules, mesh))[path], path
    gathered = jax.tree.map(lambda fn, x: fn(x), gather_fns, sharded)
    assert all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in jax.tree.leaves(gathered))
    assert_same(gathered, model.params)


def test_converting_dtypes(case, model, input_ids):
    model.shard_model(mesh=case.mesh)
    placed = {path: leaf.sharding for path, leaf in flatten(model.params).items()}
    expected = np.asarray(case.logits(case.master, input_ids))
    for verb, dtype in (
        (lambda: model.to_dtype(jnp.bfloat16), jnp.bfloat16),
        (lambda: model.half(), jnp.float16),
        (lambda: model.float(), jnp.float32),
    ):
        assert verb() is model
        current_dtype = model.module_dtype
        assert current_dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
        assert {path: leaf.sharding for path, leaf in flatten(model.params).items()} == placed
        logits = case.logits(model, input_ids)
        assert logits.dtype == dtype
        # Weights and activations in half precision: a few roundings of 2**-8 of the largest logit
        np.testing.assert_allclose(np.asarray(logits, np.float32), expected, atol=0.05 * np.abs(expected).max())
