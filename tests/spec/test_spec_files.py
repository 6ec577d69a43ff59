"""base_module.md: Converting to PyTorch, Generation, Saving and Loading, Best Practices 3 and 4."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easydel import EasyDeLBaseModule
from easydel.paths import flatten
from tests.spec.conftest import LLAMA, assert_same
from tests.spec.user_models import torch_twin


def expect_recompute(case):
    """Models without a cache say once that generation is slow."""
    return contextlib.nullcontext() if case.name == "llama" else pytest.warns(UserWarning, match="takes no cache")


def greedy_by_hand(case, model, prompt, count) -> np.ndarray:
    """Append the likeliest token, running the whole sequence each time."""
    ids = np.asarray(prompt)
    width = ids.shape[1] + count
    for length in range(ids.shape[1], width):
        # all our test models are causal, so zeros behind change nothing and one shape serves all lengths
        logits = case.logits(model, jnp.asarray(np.pad(ids, ((0, 0), (0, width - length)))))
        ids = np.concatenate([ids, np.asarray(logits[:, length - 1].argmax(-1))[:, None]], axis=1)
    return ids


def torch_model(case):
    if case.name != "llama":
        return torch_twin(case.name, case.config)
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


def test_convert_to_torch(case, model, input_ids):
    import torch

    model.shard_model(mesh=case.mesh)
    # Convert to PyTorch format
    torch_params = model.to_torch()
    twin = torch_model(case)
    twin.load_state_dict(torch_params, strict=True)
    with torch.no_grad():
        outputs = twin(torch.tensor(np.asarray(input_ids)).long())
    expected = (outputs.logits if case.name == "llama" else outputs).numpy()
    # two implementations in float32
    np.testing.assert_allclose(case.logits(model, input_ids), expected, rtol=1e-4, atol=1e-5)


def test_simple_generation(case, model, input_ids, attention_mask):
    model.shard_model(mesh=case.mesh)
    with expect_recompute(case):
        outputs = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=100,
            temperature=0.7,
            top_p=0.9,
        )
    assert outputs.sequences.shape == (2, 108)
    assert outputs.sequences.dtype == jnp.int32
    np.testing.assert_array_equal(outputs.sequences[:, :8], input_ids)
    assert 0 <= outputs.sequences.min() <= outputs.sequences.max() < case.config.vocab_size
    with expect_recompute(case):
        other = model.generate(input_ids=input_ids, max_new_tokens=100, temperature=0.7, top_p=0.9, seed=1)
    assert (other.sequences != outputs.sequences).any(), "knobs given without do_sample mean sampling"


def test_greedy_generation_takes_the_likeliest_token(case, model, input_ids):
    with expect_recompute(case):
        outputs = model.generate(input_ids=input_ids, max_new_tokens=6)
    np.testing.assert_array_equal(outputs.sequences, greedy_by_hand(case, model, input_ids, 6))


def test_manual_cache_control(case, model, input_ids):
    cache = model.init_operations_cache(
        batch_size=1,
        max_length=2048,
        starts=jnp.array([0]),  # Starting positions
    )
    assert cache.max_length == 2048
    assert len(cache.layers) == (case.config.num_hidden_layers if case.name == "llama" else 0)
    if case.name != "llama":
        return  # plain layers keep nothing between calls
    run = jax.jit(lambda ids, cache: model(input_ids=ids, cache=cache))
    row = input_ids[:1]
    outputs = run(row, cache)
    np.testing.assert_allclose(outputs.logits, case.logits(model, row), atol=1e-5)
    longer = jnp.concatenate([row, row], axis=1)
    continued = run(row, outputs.cache)
    np.testing.assert_allclose(continued.logits, case.logits(model, longer)[:, 8:], atol=1e-5)


@pytest.mark.parametrize("pads", [(0, 3), pytest.param((2, 5), marks=pytest.mark.slow)])
def test_starts_mask_out_left_padding(masters, input_ids, pads):
    model = masters["llama"]
    cache = model.init_operations_cache(batch_size=2, max_length=16, starts=jnp.asarray(pads))
    padded = jax.jit(lambda ids, cache: model(input_ids=ids, cache=cache).logits)(input_ids, cache)
    run = jax.jit(lambda ids: model(input_ids=ids).logits)
    for row, pad in enumerate(pads):
        alone = run(input_ids[row : row + 1, pad:])
        np.testing.assert_allclose(padded[row, pad:], alone[0], atol=1e-5)


def test_save_and_load(case, model, tmp_path, input_ids):
    model.shard_model(mesh=case.mesh)
    model.save_pretrained(
        tmp_path / "my-model",
        max_shard_size="5GB",
    )
    loaded = case.cls.from_pretrained(tmp_path / "my-model")
    assert type(loaded) is case.cls
    about_the_file = dict.fromkeys(("architectures", "dtype", "transformers_version"))
    assert loaded.config.to_dict() | about_the_file == case.config.to_dict() | about_the_file
    assert loaded.config.runtime_settings() == case.config.runtime_settings()
    assert_same(loaded.params, model.params)
    np.testing.assert_allclose(case.logits(loaded, input_ids), case.logits(model, input_ids), atol=1e-5)
    assert "sharding_axis_dims" not in json.loads((tmp_path / "my-model" / "config.json").read_text())


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_load_converted_and_sharded(case, model, tmp_path, size):
    model.save_pretrained(str(tmp_path), max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "4KB")
    loaded = case.cls.from_pretrained(
        str(tmp_path),
        dtype=jnp.bfloat16,
        auto_shard_model=True,
        mesh=case.mesh,
    )
    assert loaded.dtype == loaded.module_dtype == jnp.bfloat16
    expected = model.shard_model(mesh=case.mesh).to_dtype(jnp.bfloat16)
    assert_same(loaded.params, expected.params)
    for path, leaf in flatten(loaded.params).items():
        assert leaf.sharding == flatten(expected.params)[path].sharding, path


def test_automatic_sharding_uses_the_config_mesh(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path, auto_shard_model=True, sharding_axis_dims=(1, 2, 1, -1, 1))
    assert dict(loaded.mesh.shape) == {"dp": 1, "fsdp": 2, "ep": 1, "tp": 4, "sp": 1}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(loaded.params)} == {loaded.mesh}


def test_shard_before_training_and_gather_before_saving(case, tmp_path, model):
    model.save_pretrained(tmp_path / "model-name")
    optimizer = optax.sgd(0.1)

    model = case.cls.from_pretrained(tmp_path / "model-name")
    model.shard_model()  # Distribute across devices
    state = model.to_state(optimizer)
    assert all(leaf.sharding.mesh == model.mesh for leaf in jax.tree.leaves(state.params))

    model.gather_model()  # Collect to single device
    model.save_pretrained(tmp_path / "output")
    assert_same(case.cls.from_pretrained(tmp_path / "output").params, case.master.params)


def test_push_to_hub_uploads_the_saved_files(case, model, monkeypatch):
    seen = {}

    def upload(save, repo_id, *, commit_message, card, **rest):
        seen.update(repo=repo_id, message=commit_message, card=card)
        return "https://hub/commit"

    monkeypatch.setattr("easydel.hub.push.push_to_hub", upload)
    assert isinstance(model, EasyDeLBaseModule)
    url = model.push_to_hub(
        "my-username/my-model",
        commit_message="Upload model",
    )
    assert url == "https://hub/commit"
    assert seen["repo"] == "my-username/my-model"
    assert seen["message"] == "Upload model"
    assert case.cls.__name__ in seen["card"]
    assert nnx.state(model, nnx.Param)
