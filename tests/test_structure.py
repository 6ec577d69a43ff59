"""`split_again` gives what `nnx.split` gives, whatever has happened to the module since the last time."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import structure
from easydel.paths import split
from easydel.structure import split_again


def llama(**fields: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return easydel.LlamaForCausalLM(easydel.LlamaConfig(**sizes, **heads, **fields), rngs=nnx.Rngs(0))


def same(model: nnx.Module) -> structure.Structure:
    """Assert that the split is nnx's own; return the structure."""
    found, *states = split_again(model)
    graphdef, *wanted = split(model)
    assert found.graphdef == graphdef
    for got, want in zip(states, wanted, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    return found


def test_the_second_time_is_remembered_and_follows_new_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    first = same(model)
    monkeypatch.setattr(structure, "split", lambda module: pytest.fail("split anew"))
    assert split_again(model)[0] is first
    monkeypatch.undo()
    model.merge_params_dict(jax.tree.map(lambda x: x + 1, model.params))
    assert same(model) is first
    model.model.layers[3].mlp.up_proj.kernel = nnx.Param(jnp.ones((16, 16)))
    assert same(model) is first


def test_what_changes_the_structure_is_noticed() -> None:
    model = llama()
    seen = [same(model)]
    model.lm_head.kernel = nnx.Param(jnp.ones((16, 32)), sharding_hint="x")  # metadata
    seen.append(same(model))
    model.model.layers[0].mlp.up_proj.kernel = model.model.layers[1].mlp.up_proj.kernel  # tied
    seen.append(same(model))
    model.model.norm.scale = nnx.LoRAParam(jnp.ones(16))  # another kind
    seen.append(same(model))
    model.config.rms_norm_eps = 0.1
    seen.append(same(model))
    model.generation_settings = "{}"
    seen.append(same(model))
    assert len(set(seen)) == len(seen)


def test_equal_models_have_equal_structures() -> None:
    one, other = split_again(llama())[0], split_again(llama())[0]
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one != split_again(llama(rms_norm_eps=0.5))[0]


def test_plain_arrays_are_split_like_nnx_does() -> None:
    class Odd(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(3))
            self.table = nnx.data(jnp.arange(3.0))

    model = Odd()
    for _ in range(2):
        _, params, other = split_again(model)
        assert len(jax.tree.leaves(params)) == 1
        np.testing.assert_array_equal(jax.tree.leaves(other)[0], [0, 1, 2])


def test_a_module_is_not_kept_alive() -> None:
    model = llama()
    split_again(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
