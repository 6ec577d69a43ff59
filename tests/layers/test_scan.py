"""Layers stored stacked: which are stored together, how they are named, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from easydel import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, ShardingError, native
from easydel.layers import LayerOutput, ScannedLayers
from easydel.layers.periods import ranges_of
from easydel.paths import flatten, named_modules, named_variables, nest

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def llama(layers: int, **fields: Any) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPE | fields, num_key_value_heads=1, num_hidden_layers=layers)
    return LlamaForCausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kinds", "ranges"),
    [
        ("", []),
        ("a", ["0:1:1"]),
        ("aaaa", ["0:4:1"]),
        ("abab", ["0:4:2", "1:4:2"]),
        ("ababa", ["0:4:2", "1:4:2", "4:5:1"]),
        ("aabbb", ["0:2:1", "2:5:1"]),
        ("aaabaaab", ["0:8:4", "1:8:4", "2:8:4", "3:8:4"]),
        ("aaabaaabaa", ["0:8:4", "1:8:4", "2:8:4", "3:8:4", "8:10:1"]),
        ("abc", ["0:1:1", "1:2:1", "2:3:1"]),
    ],
)
def test_longest_runs_of_the_shortest_patterns(kinds: str, ranges: list[str]) -> None:
    found = ranges_of(kinds)
    assert [f"{r.start}:{r.stop}:{r.step}" for r in found] == ranges
    assert sorted(layer for r in found for layer in r) == list(range(len(kinds)))
    assert all(len({kinds[layer] for layer in r}) == 1 for r in found)


def equations(jaxpr: Any) -> list[str]:
    """Return the names of all operations, those inside of others too."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            names += equations(inner) if hasattr(inner, "eqns") else []
    return names


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_training_step_has_the_same_operations_whatever_the_depth(remat: str) -> None:
    counts = []
    for depth in (3, 9):
        model = llama(depth, scan_layers=True, gradient_checkpointing=remat)
        state, ids = model.to_state(optax.sgd(0.1)), jnp.ones((2, 8), jnp.int32)
        pure = model.pure_transform_fn()

        def step(state: Any, ids: Any, pure: Any = pure) -> Any:
            inputs = {"input_ids": ids, "labels": ids}
            return state.apply_gradients(jax.grad(lambda params: pure(params, inputs).loss)(state.params))

        names = equations(jax.make_jaxpr(step)(state, ids).jaxpr)
        text = jax.jit(step).lower(state, ids).compile().as_text()
        counts.append(([names.count(name) for name in ("dot_general", "scan")], text.count(" while("), len(names)))
    assert counts[0] == counts[1]
    assert counts[0][0][1] == 2, "one loop forwards and one backwards"


def test_some_layers_of_another_kind_are_a_stack_of_their_own() -> None:
    fields = {"num_hidden_layers": 3, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 4}
    pair = [
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, **fields, max_window_layers=2, scan_layers=scan), rngs=nnx.Rngs(0))
        for scan in (False, True)
    ]
    assert list(pair[1].model.layers.stacks()) == ["0:2:1", "2:3:1"]
    ids = jnp.arange(16).reshape(2, 8)
    got, want = (jax.jit(model.__call__)(ids).logits for model in (pair[1], pair[0]))
    np.testing.assert_allclose(got, want, atol=1e-6)
    tokens = [model.generate(ids, max_new_tokens=6, do_sample=False).sequences for model in pair]
    np.testing.assert_array_equal(*tokens)


def test_each_layer_is_named_and_seen_as_if_alone() -> None:
    alone, model = llama(3), llama(3, scan_layers=True)
    assert list(named_variables(model)) == list(named_variables(alone))
    assert list(named_modules(model)) == list(named_modules(alone))
    layers = model.params["model"]["layers"]
    assert list(layers) == list(layers.keys()) == ["0", "1", "2"]
    assert len(layers) == 3
    assert "2" in layers
    assert "3" not in layers
    assert layers.get("3") is None
    kernel = layers["2"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, alone.params["model"]["layers"]["2"]["mlp"]["up_proj"]["kernel"])
    np.testing.assert_array_equal(kernel, model.model.layers[2].mlp.up_proj.kernel.get_value())
    assert len(jax.tree.leaves(model.params)) < len(jax.tree.leaves(alone.params))
    shapes = flatten(model.graphtree_params_shape)
    assert shapes == flatten(alone.graphtree_params_shape)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers)), jax.tree.map(lambda x: x, layers)):
        np.testing.assert_array_equal(other["2"]["mlp"]["up_proj"]["kernel"], kernel)
    with pytest.raises(KeyError, match="3"):
        layers["3"]
    with pytest.raises(IndexError, match="layer 3 of 3"):
        model.model.layers[3]
    with pytest.raises(TypeError, match="merge_params_dict"):
        layers["2"] = {}


def test_some_layers_can_be_merged() -> None:
    model, before = llama(3, scan_layers=True), flatten(llama(3).params)
    path = "model/layers/1/mlp/up_proj/kernel"
    new = jnp.full_like(before[path], 2.0)
    model.merge_params_dict(nest({path: new}))
    after = flatten(model.params)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], new if name == path else value, err_msg=name)
    for wrong, message in (
        ({path: new[:1]}, "model/layers/1/mlp/up_proj/kernel: expected shape"),
        ({path.replace("1", "3"): new}, "no such parameter"),
        ({path.replace("1", "0:2:1"): jnp.stack([new, new, new])[:2, :1]}, "expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model.merge_params_dict(nest(wrong))


def test_rules_that_tell_layers_apart_are_refused() -> None:
    model = llama(3, scan_layers=True)
    rules = [("layers/1/.*up_proj", P(None, "tp")), ("up_proj", P("fsdp", "tp")), (".*", P())]
    with pytest.raises(ShardingError, match=r"layers/0/mlp/up_proj/kernel: gets .* but model/layers/1/.*scan_layers"):
        model.shard_model(rules)
    specs = model._specs_sharding([("layers/.*up_proj", P("fsdp", "tp")), (".*", P())])
    assert specs["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"] == P("fsdp", "tp")
    assert flatten(specs, by_layer=False)["model/layers/0:3:1/mlp/up_proj/kernel"] == P(None, "fsdp", "tp")
    model.fully_shard()
    kernel = flatten(model.params, by_layer=False)["model/layers/0:3:1/mlp/up_proj/kernel"]
    assert kernel.sharding.spec[0] is None
    functions = model._shard_fns()
    placed = jax.tree.map(lambda function, array: function(array), functions, model.params)
    assert jax.tree.structure(placed) == jax.tree.structure(model.params)


def test_a_training_state_steps_as_layers_one_by_one() -> None:
    ids, losses = jnp.arange(12).reshape(2, 6), []
    for scan in (False, True):
        model = llama(2, scan_layers=scan)
        state, pure = model.to_state(optax.adamw(1e-2)), model.pure_transform_fn()

        @jax.jit
        def step(state: Any, pure: Any = pure) -> Any:
            loss, grads = jax.value_and_grad(lambda p: pure(p, {"input_ids": ids, "labels": ids}).loss)(state.params)
            return state.apply_gradients(grads), loss

        for _ in range(3):
            state, loss = step(state)
        losses.append(float(loss))
        assert jax.eval_shape(state.model.__call__, ids).logits.shape == (2, 6, 64)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_dropout_draws_what_layers_one_by_one_draw() -> None:
    ids, logits = jnp.arange(12).reshape(2, 6), []
    for scan in (False, True):
        model = llama(2, scan_layers=scan, attention_dropout=0.5)
        forward = jax.jit(model.pure_transform_fn())
        logits.append(forward(model.params, {"input_ids": ids}, rngs=jax.random.key(1)).logits)
        model.train()
        one, two = model(ids).logits, model(ids).logits
        assert np.abs(one - two).max() > 1e-3, "the keys that were drawn are counted"
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)


def test_dtypes_follow() -> None:
    model = llama(3, scan_layers=True).half()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float16"}
    ids = jnp.ones((1, 4), jnp.int32)
    assert jax.eval_shape(model.__call__, ids).logits.dtype == jnp.float16
    assert jax.eval_shape(model.resize_token_embeddings(70).__call__, ids).logits.shape == (1, 4, 70)


class Numbered(nnx.Module):
    def __init__(self, number: int) -> None:
        self.number, self.scale = number, nnx.Param(jnp.ones(2))

    def __call__(self, hidden: Any, inputs: Any, cache: Any) -> LayerOutput:
        return LayerOutput(hidden * self.scale * self.number)


def test_blocks_that_know_their_number_are_not_stored_together() -> None:
    numbers = iter(range(3))
    with pytest.raises(ValueError, match="layers 0 and 1 are of one kind but built differently"):
        ScannedLayers.build(lambda kind: Numbered(next(numbers)), ["a"] * 3, nnx.Rngs(0))


def test_products_in_a_scan_read_a_stack_or_are_left_to_xla() -> None:
    rows, stack = jnp.ones((1, 256)), jnp.ones((2, 256, 256))
    kernel = stack[0]
    elsewhere = native.serves_few_rows(rows, [kernel])
    assert elsewhere == native.is_available()
    with native.kernels_are_sliced([]):
        assert not native.serves_few_rows(rows, [kernel])
    with native.kernels_are_sliced([native.Slice(kernel, stack, jnp.int32(0))]):
        assert native.serves_few_rows(rows, [kernel]) == elsewhere
    assert native.serves_few_rows(rows, [kernel]) == elsewhere


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_tokens_are_generated_from_the_stacks_themselves() -> None:
    model = llama(2, hidden_size=256, intermediate_size=512, scan_layers=True)
    cache = model.init_operations_cache(1, 8)
    token = jnp.ones((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda cache: model(jnp.ones((1, 3), jnp.int32), cache=cache).cache, cache)
    fn = model.pure_transform_fn()
    text = jax.jit(fn).lower(model.params, {"input_ids": token, "cache": cache}).compile().as_text()
    assert text.count('custom_call_target="easydel_few_rows"') == 4  # q, k and v together, o, gate and up, down
    assert "f32[256,512]" not in text, "a layer's kernel was copied"
