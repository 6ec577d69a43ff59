"""Keys and values as int8: their error, their bytes, and that every kind of cache keeps them so."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import easydel
from easydel.caching import AttentionCache, CrossAttentionCache, QuantizedStates, SlidingCache
from easydel.layers.attention import AttentionMask, attend
from easydel.sharding import create_mesh

RNG = np.random.default_rng(0)
LENGTH = 23
QUERY, KEY, VALUE = (RNG.normal(size=(2, LENGTH, 2, 4)).astype(np.float32) for _ in range(3))
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
IDS = RNG.integers(1, 32, (2, 12)).astype(np.int32)


def reference(x: np.ndarray) -> np.ndarray:
    """Round to 127 steps of each head's largest magnitude, in numpy."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    steps = np.float32(1) * largest / np.float32(127)
    return np.rint(x / np.where(steps == 0, 1, steps)) * steps


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_is_within_half_a_step(dtype: Any) -> None:
    x = RNG.normal(size=(3, 5, 2, 64)) * 10.0 ** RNG.integers(-6, 6, (3, 5, 2, 1))
    x[0, 0] = 0
    x[1, 2, 0, 7] = 1e9  # an outlier costs its own head only
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    states = QuantizedStates.of(jnp.asarray(x, dtype))
    assert states.codes.dtype == jnp.int8
    got = np.asarray(states.read(jnp.float32))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(got - x) <= largest / 254 * (1 + 1e-5)).all()  # and float32's rounding
    np.testing.assert_allclose(got, reference(x), rtol=0, atol=float(largest.max()) * 1e-6)
    assert not got[0, 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_pass_for_a_number(bad: float) -> None:
    x = np.ones((1, 1, 2, 4), np.float32)
    x[0, 0, 0, 1] = bad
    got = np.asarray(QuantizedStates.of(jnp.asarray(x)).read(jnp.float32))
    assert np.isnan(got[0, 0, 0, 1])
    assert (got[0, 0, 1] == 1).all()


@functools.partial(jax.jit, static_argnames=("window", "rounded"))
def step(query: Any, key: Any, value: Any, cache: Any, done: Any, *, window: int | None, rounded: bool) -> Any:
    """Compiled once for each kind of cache and number of tokens: op by op it takes many times as long."""
    cache, keys, values, mask = cache.extend(key, value, AttentionMask(offset=done))
    if rounded:
        keys, values = (jax.pure_callback(lambda x: reference(np.asarray(x)), x, x) for x in (keys, values))
    return cache, attend(query, keys, values, mask.with_window(window), mechanism="vanilla", scale=0.5)[0]


def run(cache: Any, chunks: tuple[int, ...], window: int | None, rounded: bool = False) -> np.ndarray:
    """Attend in chunks; `rounded`: what earlier chunks left is rounded here, and the cache itself is exact."""
    outputs, done = [], 0
    for size in chunks:
        part = slice(done, done + size)
        arrays = QUERY[:, part], KEY[:, part], VALUE[:, part]
        start = None if done == 0 else jnp.int32(done)
        cache, out = step(*arrays, cache, start, window=window, rounded=rounded and done > 0)
        done += size
        outputs.append(np.asarray(out))
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_it_is_attention_over_rounded_numbers(window: int | None) -> None:
    chunks = (7, *(1,) * (LENGTH - 7))
    exact, ours = (AttentionCache.create(2, LENGTH, 2, 4, dtype) for dtype in (np.float32, np.int8))
    got = run(ours if window is None else SlidingCache.create(2, LENGTH, window, 2, 4, np.int8), chunks, window)
    np.testing.assert_allclose(got, run(exact, chunks, window, rounded=True), atol=2e-6)
    assert np.abs(got - run(exact, chunks, window)).max() > 1e-4, "it is not exact"


def test_a_ring_takes_several_tokens_and_grows() -> None:
    cache = SlidingCache.create(2, 3, 5, 2, 4, np.int8)
    chunks = (2, 1, 9, 4, *(1,) * 7)
    outputs = run(cache.grow(LENGTH), chunks, 5)
    np.testing.assert_allclose(outputs, run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), chunks, 5), atol=3e-2)
    assert cache.grow(4).key.codes.shape == (2, 4, 2, 4)
    assert cache.grow(100).value.scales.shape == (2, 5, 2, 1)


def test_cross_attention_keeps_what_it_is_given_as_int8() -> None:
    empty = CrossAttentionCache(is_quantized=True)
    assert jax.tree.leaves(empty) == []
    filled = empty.filled(jnp.asarray(KEY), jnp.asarray(VALUE), None)
    key, value = filled.read(jnp.float32)
    np.testing.assert_allclose(key, reference(KEY), atol=1e-6)
    np.testing.assert_allclose(value, reference(VALUE), atol=1e-6)
    assert CrossAttentionCache().filled(jnp.asarray(KEY), jnp.asarray(VALUE), None).key.dtype == jnp.float32


def nbytes(cache: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def test_bytes_at_heads_of_64() -> None:
    model = easydel.LlamaForCausalLM(easydel.LlamaConfig(**SMALL, **HEADS, head_dim=64))
    whole, small = (model.init_operations_cache(2, 128, dtype=dtype) for dtype in (None, "int8"))
    assert nbytes(small) / nbytes(whole) == (64 + 4) / 256  # ≤ 0.3


def models() -> dict[str, Any]:
    t5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "gemma2": (easydel.Gemma2ForCausalLM, easydel.Gemma2Config(**SMALL, **HEADS, **windows, head_dim=4)),
        "scanned": (
            easydel.Gemma2ForCausalLM,
            easydel.Gemma2Config(**SMALL, **HEADS, **windows, head_dim=4, scan_layers=True),
        ),
        "t5": (easydel.T5ForConditionalGeneration, easydel.T5Config(**t5, decoder_start_token_id=0)),
    }


@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scanned", "t5"))]
)
def test_a_model_runs_on_it(name: str) -> None:
    """Logits after a prompt and single tokens, padded by `starts`, on one device and on eight."""
    kind, config = models()[name]
    model = kind(config)
    forward = jax.jit(model.pure_transform_fn())

    def logits(params: Any, dtype: Any, width: int = 12, starts: Any = None, end: int = 12) -> tuple[np.ndarray, Any]:
        given: dict[str, Any] = {"input_ids": IDS}
        key = "decoder_input_ids" if name == "t5" else "input_ids"
        cache, parts, pad = model.init_operations_cache(2, width, starts=starts, dtype=dtype), [], width - 12
        ids = np.pad(IDS, ((0, 0), (pad, 0)))
        for first, last in pairwise((0, *(pad + place for place in (9, 10, 12) if place <= end))):
            out = forward(params, {**given, key: ids[:, first:last], "cache": cache})
            cache = out.cache
            parts.append(np.asarray(out.logits))
        return np.concatenate(parts, axis=1)[:, pad:], cache

    exact, whole = logits(model.params, None)
    got, cache = logits(model.params, "int8")
    assert nbytes(cache) < nbytes(whole)
    states = jax.tree.leaves(cache.layers, is_leaf=lambda x: isinstance(x, QuantizedStates))
    assert all(isinstance(state, QuantizedStates) or state.dtype == bool for state in states)
    np.testing.assert_array_equal(got[:, :9], exact[:, :9], err_msg="a prompt attends to itself, not to its codes")
    spread = exact.std()
    # Numbers rounded to 1/254 of the largest of few: some hundredths of the logits' spread, never zero.
    assert 1e-6 < np.abs(got - exact).max() / spread < 0.1
    padded, _ = logits(model.params, "int8", width=15, starts=np.array([3, 3], np.int32), end=10)
    np.testing.assert_allclose(padded, got[:, :10], atol=1e-4 * spread)
    model.shard_model(mesh=create_mesh((1, 4, 1, 2, 1)))
    sharded, cache = logits(model.params, "int8", end=10)
    first = cache.layers[0].own if name == "t5" else cache.layers[0]
    for array in (first.key.codes, first.key.scales):
        assert array.sharding.shard_shape(array.shape)[2] == array.shape[2] // 2, "split by heads"
    np.testing.assert_allclose(
        sharded, got[:, :10], atol=2e-2 * spread, err_msg="a number between two codes may round anew"
    )


def test_generate_keeps_int8() -> None:
    model = easydel.LlamaForCausalLM(
        easydel.LlamaConfig(**SMALL | {"num_hidden_layers": 1}, **HEADS, eos_token_id=None)
    )
    options: dict[str, Any] = {"max_new_tokens": 9, "cache_implementation": "quantized"}
    got = model.generate(IDS, **options).sequences
    cache = model.init_operations_cache(2, 32, dtype="int8")
    ids, forward = IDS, jax.jit(model.pure_transform_fn())
    for _ in range(9):
        out = forward(model.params, {"input_ids": ids if ids is IDS else ids[:, -1:], "cache": cache})
        ids, cache = np.concatenate([ids, np.asarray(out.logits[:, -1].argmax(-1))[:, None]], axis=1), out.cache
    np.testing.assert_array_equal(got, ids)
    steps = np.stack(list(model.stream(IDS, **options, cache_config={"nbits": 8})), axis=1)
    np.testing.assert_array_equal(steps, ids[:, 12:])


def test_what_cannot_be_int8_is_refused() -> None:
    llama = easydel.LlamaForCausalLM(easydel.LlamaConfig(**SMALL, **HEADS))
    for dtype in ("int4", "nonsense", jnp.bfloat16):
        with pytest.raises(ValueError, match="dtype must be 'int8' or None"):
            llama.init_operations_cache(1, 8, dtype=dtype)
    for dtype in (jnp.int8, np.dtype("int8")):
        assert llama.init_operations_cache(1, 8, dtype=dtype).layers[0].key.codes.dtype == jnp.int8
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 4,
    }
    mamba = easydel.Mamba2ForCausalLM(easydel.Mamba2Config(**small, n_groups=1))
    with pytest.raises(easydel.UnsupportedError, match="keep no keys and values"):
        mamba.generate(IDS, cache_implementation="quantized")


def test_a_layer_that_knows_no_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be cut off without a scale."""
    llama = easydel.LlamaForCausalLM(easydel.LlamaConfig(**SMALL, **HEADS))
    naive = AttentionCache(jnp.zeros((1, 8, 2, 4), jnp.int8), jnp.zeros((1, 8, 2, 4), jnp.int8))
    monkeypatch.setattr(type(llama.model.layers[0].self_attn), "init_cache", lambda *_: naive)
    with pytest.raises(easydel.UnsupportedError, match="made plain int8 arrays"):
        llama.init_operations_cache(1, 8, dtype="int8")
