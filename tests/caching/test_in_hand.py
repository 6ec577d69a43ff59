"""Caches in hand: cropped, repeated, moved, saved, loaded and gone on from."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel.caching import Cache
from easydel.errors import UnsupportedError
from easydel.sharding import create_mesh
from tests.caching.test_mixed_caches import CONFIG, MixedLM
from tests.caching.test_reorder import LAYERS, cache_of
from tests.generation.tiny import VOCAB, forgetful, llama

RNG = np.random.default_rng(2)
IDS = RNG.integers(1, VOCAB, (3, 30))
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def mixed() -> MixedLM:
    return MixedLM(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def compiled(model: Any) -> Any:
    return jax.jit(lambda ids, cache: model(input_ids=ids, cache=cache))


def forward(model: Any, ids: Any, cache: Cache) -> Any:
    """Run a model as one program: op by op it takes many times as long."""
    return compiled(model)(ids, cache)


def after(model: Any, ids: Any, slots: int = 64, **options: Any) -> Cache:
    return forward(model, ids, model.init_operations_cache(len(ids), slots, **options)).cache


def new(out: Any) -> np.ndarray:
    return np.asarray(out.sequences)[:, 30:]


# ------------------------------------------------------------------ cropping
def test_a_cropped_cache_is_that_of_the_shorter_prompt() -> None:
    cropped, short = after(llama(), IDS).crop(12), after(llama(), IDS[:, :12])
    np.testing.assert_array_equal(after(llama(), IDS).crop(-18).seen, short.seen)
    for cache in (cropped, short):
        assert int(cache.index) == 12
    np.testing.assert_array_equal(cropped.valid, short.valid)
    got, want = (forward(llama(), IDS[:, 12:13], cache).logits for cache in (cropped, short))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # the prompts were run in other shapes


def test_what_cannot_be_cropped_says_why(mixed: MixedLM) -> None:
    cache = after(mixed, IDS)
    assert int(cache.crop(30).index) == 30
    with pytest.raises(ValueError, match="recurrent layer's cache cannot be cropped from 30 slots to 12"):
        cache.crop(12)
    with pytest.raises(ValueError, match="a ring of 4 slots, of which 30 were written"):
        cache.layers[2].crop(12, 30)
    with pytest.raises(ValueError, match="30 slots are written cannot be cropped to 31"):
        cache.crop(31)


# ------------------------------------------------------------------ moving
@pytest.mark.parametrize("kind", LAYERS)
def test_a_cache_moved_and_moved_back(kind: str) -> None:
    cache = cache_of((LAYERS[kind],))
    moved = cache.shift(1)
    assert int(moved.index) == int(cache.index) + 1
    for one, other in zip(jax.tree.leaves(moved.shift(-1)), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------ files
def assert_same(one: Cache, other: Cache) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    "kind",
    ["recurrent, full and sliding", "int8", "bfloat16", "in a scan", "encoder", "latent", "latent int8", "recurrent"],
)
def test_saved_and_loaded_bit_for_bit(kind: str, mixed: MixedLM, tmp_path: Path) -> None:
    if kind == "in a scan":
        config = easydel.LlamaConfig(**llama().config.to_dict() | {"num_hidden_layers": 2, "scan_layers": True})
        cache = after(easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(1)), IDS)
    elif kind == "encoder":
        cache = cache_of((LAYERS["encoder and decoder"],))
    elif kind.startswith("latent"):
        cache = cache_of((LAYERS[kind],))
    elif kind == "recurrent":
        cache = Cache.create((LAYERS["recurrent"],), 3, None, np.zeros(3, np.int32))
    elif kind == "bfloat16":
        cache = after(nnx.clone(llama()).to_dtype("bfloat16"), IDS)
    else:
        cache = after(mixed, IDS, dtype="int8" if kind == "int8" else None)
    cache.save(tmp_path / "made")
    assert_same(Cache.load(tmp_path / "made"), cache)
    meshed = Cache.load(tmp_path / "made", create_mesh((1, 4, 1, 2, 1)))
    assert_same(meshed, cache)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(meshed))


def test_heads_and_rows_are_split_over_the_mesh(tmp_path: Path) -> None:
    config = easydel.LlamaConfig(**llama().config.to_dict() | {"num_key_value_heads": 2})
    after(easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(1)), np.concatenate([IDS, IDS[:1]])).save(tmp_path)
    key = Cache.load(tmp_path, create_mesh((1, 4, 1, 2, 1))).layers[0].key
    assert key.sharding.shard_shape(key.shape) == (1, 64, 1, 8)


def test_a_cache_from_disk_is_gone_on_from_on_a_mesh(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    after(llama(), IDS[:, :12]).save(tmp_path / "cache")
    model = easydel.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", sharding_axis_dims=(1, 4, 1, 2, 1), auto_shard_model=True
    )
    out = model.generate(IDS, cache=Cache.load(tmp_path / "cache", model.mesh), **OPTIONS)
    np.testing.assert_array_equal(new(out), new(llama().generate(IDS, **OPTIONS)))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    after(llama(), IDS).save(tmp_path)
    said = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(said | {"format": 9}))
    with pytest.raises(ValueError, match="format 9, expected 1"):
        Cache.load(tmp_path)
    said["cache"]["fields"]["seen"] = {"array": "elsewhere"}
    (tmp_path / "cache.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="'elsewhere' is missing"):
        Cache.load(tmp_path)
    with pytest.raises(UnsupportedError, match="of kind object cannot be saved"):
        Cache.create((object(),), 3, 4, np.zeros(3, np.int32)).save(tmp_path)


# ------------------------------------------------------------------ going on
@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "recurrent, full and sliding"])
@pytest.mark.parametrize("kept", [1, 29])
def test_prompts_go_on_from_a_cache(kept: int, kind: str, mixed: MixedLM) -> None:
    model = llama() if kind == "full" else mixed
    cache = after(model, IDS[:, :kept])
    got = model.generate(IDS, cache=cache, **OPTIONS)
    np.testing.assert_array_equal(got.sequences[:, :30], IDS)
    np.testing.assert_array_equal(new(got), new(model.generate(IDS, **OPTIONS)))
    again = model.generate(IDS, cache=cache, **OPTIONS)  # it is not used up
    np.testing.assert_array_equal(again.sequences, got.sequences)


def test_one_row_serves_prompts_of_several_lengths() -> None:
    ids, mask = IDS.copy(), np.ones(IDS.shape, bool)
    ids[:, :10] = ids[0, :10]
    mask[1, 15:], mask[2, 22:] = False, False
    cache = after(llama(), ids[:1, :10])
    beams = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    np.testing.assert_array_equal(
        llama().generate(ids, attention_mask=mask, cache=cache, **beams).sequences,
        llama().generate(ids, attention_mask=mask, **beams).sequences,
    )


def test_an_int8_cache_is_gone_on_from() -> None:
    cache = after(llama(), IDS[:, :12], dtype="int8")
    got = new(llama().generate(IDS, cache=cache, **OPTIONS))
    step = forward(llama(), IDS[:, 12:], cache)
    np.testing.assert_array_equal(got[:, 0], np.asarray(step.logits)[:, -1].argmax(-1))


def test_windows_need_equal_numbers_of_tokens(mixed: MixedLM) -> None:
    mask = np.ones(IDS.shape, bool)
    mask[1, 25:] = False
    with pytest.raises(ValueError, match="sliding windows"):
        mixed.generate(IDS, attention_mask=mask, cache=after(mixed, IDS[:1, :10]), **OPTIONS)


def test_caches_that_do_not_fit_are_refused(mixed: MixedLM) -> None:
    whole, two = after(llama(), IDS), after(llama(), IDS[:2, :5])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (whole, {}, "holds 30 tokens of row 0, its prompt has 30"),
        (two, {}, "the cache has 2 rows, input_ids have 3"),
        (llama().init_operations_cache(3, 64), {}, "holds nothing yet"),
        (two.layers, {}, "must be an easydel.caching.Cache"),
        (after(llama(), IDS[:, :5]), {"cache_implementation": "quantized"}, "says itself"),
    ]
    for cache, options, match in cases:
        with pytest.raises(ValueError, match=match):
            llama().generate(IDS, cache=cache, **options)
    with pytest.raises(UnsupportedError, match="cache= is not supported by Forgetful"):
        forgetful().generate(IDS, cache=two)
