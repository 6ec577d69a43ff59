"""Latent attention keeps few numbers a token, and attends to them in two forms that agree."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel.caching import Cache, LatentCache
from easydel.layers import LatentAttention
from easydel.planning import plan_training
from easydel.sharding import create_mesh
from tests.lora.tiny import randomise

RANK, ROTARY, LAYERS, SLOTS = 16, 4, 1, 24
CONFIG: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": RANK, "qk_rope_head_dim": ROTARY,
    "qk_nope_head_dim": 12, "v_head_dim": 8, "first_k_dense_replace": LAYERS, "max_position_embeddings": 64,
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 32, (2, SLOTS)).astype(np.int32)
SAME = 1e-5  # the same numbers, summed in another order


@functools.cache
def model() -> Any:
    return easydel.DeepseekV3ForCausalLM(easydel.DeepseekV3Config(**CONFIG), rngs=nnx.Rngs(1))


def nbytes(cache: Cache) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def in_parts(of: Any, dtype: Any = None) -> tuple[np.ndarray, Cache]:
    """Return the logits of a prompt, single tokens and several at once, and the cache."""
    forward = jax.jit(of.pure_transform_fn())
    cache, parts = of.init_operations_cache(2, SLOTS, dtype=dtype), []
    for first, last in pairwise((0, *range(8, 17), SLOTS)):  # two widths, two programs
        out = forward(of.params, {"input_ids": IDS[:, first:last], "cache": cache})
        cache = out.cache
        parts.append(np.asarray(out.logits))
    return np.concatenate(parts, axis=1), cache


def at_once(of: Any) -> np.ndarray:
    return np.asarray(jax.jit(of.pure_transform_fn())(of.params, {"input_ids": IDS}).logits)


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    return at_once(model())


@pytest.fixture(scope="module")
def absorbed() -> tuple[np.ndarray, Cache]:
    """What so few tokens at a time give: see `test_a_few_tokens_are_absorbed_and_many_are_not`."""
    return in_parts(model())


def close(got: np.ndarray, want: np.ndarray, tolerance: float = SAME) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_bytes_of_a_token() -> None:
    """`kv_lora_rank + qk_rope_head_dim` numbers in each layer, where keys and values of all heads were 4 · (16 + 8)."""
    tokens = 2 * SLOTS * LAYERS
    assert nbytes(model().init_operations_cache(2, SLOTS)) == tokens * (RANK + ROTARY) * 4
    half = easydel.DeepseekV3ForCausalLM(model().config, dtype=jnp.bfloat16)
    assert nbytes(half.init_operations_cache(2, SLOTS)) == tokens * (RANK + ROTARY) * 2
    assert nbytes(model().init_operations_cache(2, SLOTS, dtype="int8")) == tokens * (RANK + ROTARY + 2 * 4)


def test_what_is_planned_is_what_is_held() -> None:
    plan = plan_training(model().config, {"fsdp": 1}, batch_size=2, sequence_length=SLOTS, policies=())
    cache = model().init_operations_cache(2, SLOTS)
    assert plan.bytes_per_device["cache"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert plan.bytes_per_device["cache"] >= 2 * SLOTS * LAYERS * (RANK + ROTARY) * 4


def test_both_forms_are_what_one_run_gives(whole: np.ndarray, absorbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    close(absorbed[0], whole)
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: False)
    close(in_parts(model())[0], whole)


def test_a_few_tokens_are_absorbed_and_many_are_not() -> None:
    """As many products either way at `latent · (plain + value) / (2 · (latent + rotary) - plain - rotary - value)`."""
    layer = model().model.layers[0].self_attn
    assert [layer.absorbs(queries) for queries in (1, 19, 20, 21)] == [True, True, False, False]


def test_with_codes_or_adapters_in_its_place_the_matrix_is_theirs(whole: np.ndarray) -> None:
    """Adapters on codes: the absorbed form, which asks for the matrix, gives what the layer called gives."""
    other = randomise(nnx.clone(model()).quantize("nf4", group_size=16).apply_lora_to_layers())
    want = at_once(other)
    assert np.abs(want - whole).max() > 0.05 * np.abs(want).max()
    close(in_parts(other)[0], want)


def test_int8(whole: np.ndarray) -> None:
    want = whole
    got, cache = in_parts(model(), "int8")
    assert isinstance(cache.layers[0], LatentCache)
    close(got[:, :8], want[:, :8])  # a prompt attends to itself, not to its codes
    # Numbers rounded to 1/254 of the largest of few: some hundredths of the logits' spread, never zero.
    assert 1e-4 < np.abs(got - want).max() / want.std() < 0.1


def test_cropped_loaded_and_for_several_rows_it_is_gone_on_from(absorbed: Any, tmp_path: Any) -> None:
    prompt, options = IDS[:1].repeat(2, axis=0), {"max_new_tokens": 6, "do_sample": False}
    prompt[1, 12:] = IDS[1, 12:]
    cache = absorbed[1].reorder(np.array([0])).crop(10)
    cache.save(tmp_path)
    got = model().generate(prompt, cache=Cache.load(tmp_path), **options).sequences
    np.testing.assert_array_equal(got, model().generate(prompt, **options).sequences)


@pytest.mark.filterwarnings("ignore:.*mesh axis.* dropped:UserWarning")
def test_on_eight_devices(whole: np.ndarray) -> None:
    sharded = nnx.clone(model()).shard_model(mesh=create_mesh((1, 2, 1, 4, 1)))
    got, cache = in_parts(sharded)
    close(got, whole)
    array = cache.layers[0].parts[0]
    assert array.sharding.shard_shape(array.shape) == (1, SLOTS, 1, RANK + ROTARY), "split by rows, not by heads"
