"""base_module.md: LoRA (Low-Rank Adaptation)."""

from __future__ import annotations

import jax
import numpy as np
import optax

from easydel.paths import flatten, nest
from tests.spec.conftest import assert_same

LAYERS = {"llama": ("q_proj", "v_proj"), "my_model": ("up", "down"), "mixing": ("layers/0", "layers/1")}


def pattern_of(case):
    return "|".join(f".*{name}.*" for name in LAYERS[case.name])


def test_applying_lora(case, model, input_ids):
    before = np.asarray(case.logits(model, input_ids))
    paths = flatten(model.params).keys()
    assert model.lora_is_enabled is False
    if case.name == "llama":
        result = model.apply_lora_to_layers(
            lora_rank=8,
            lora_alpha=16,
            lora_pattern=".*q_proj.*|.*v_proj.*",  # Apply to Q and V projections
        )
    else:  # the page's own model has no such layers
        result = model.apply_lora_to_layers(lora_rank=8, lora_alpha=16, lora_pattern=pattern_of(case))
    assert result is model
    has_lora = model.lora_is_enabled
    assert has_lora is True
    new = flatten(model.params).keys() - paths
    layers = {path.rpartition("/lora/")[0] for path in new}
    assert all(any(layer.endswith(name) for layer in layers) for name in LAYERS[case.name])
    assert all(layer.endswith(LAYERS[case.name]) for layer in layers)
    np.testing.assert_array_equal(case.logits(model, input_ids), before)


def test_managing_lora_parameters(case, model, input_ids):
    model.shard_model(mesh=case.mesh)
    original = model.params
    model.apply_lora_to_layers(lora_pattern=pattern_of(case))
    base_params, lora_params = model.split_lora_params()
    assert_same(base_params, original)
    noise = np.random.default_rng(0)
    changed = {path: np.float32(0.1 * noise.standard_normal(x.shape)) for path, x in flatten(lora_params).items()}
    model.merge_lora_params(nest(changed))
    assert_same(model.split_lora_params()[1], nest(changed))
    result = model.merge_lora_params()
    assert result is model
    assert_same(model.split_lora_params()[0], original)  # put in place, never folded
    want = np.asarray(case.logits(model, input_ids))
    result = model.unwrap_lora_to_layers()
    assert result is model
    assert model.lora_is_enabled is False
    assert flatten(model.params).keys() == flatten(original).keys()
    got = np.asarray(case.logits(model, input_ids))
    # Folded in float32, summed in another order: 3e-7 of the largest were seen.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_only_adapters_train(case, model, input_ids):
    model.apply_lora_to_layers(lora_pattern=pattern_of(case))
    state = model.to_state(optax.adamw(1e-2))
    _, lora_params = model.split_lora_params()
    assert flatten(state.trainable_params).keys() == flatten(lora_params).keys()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    adapters = jax.tree.leaves(lora_params)
    assert sum(leaf.nbytes for leaf in moments) == 2 * sum(leaf.nbytes for leaf in adapters)
