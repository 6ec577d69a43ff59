"""The kernel for one query: its numbers, its derivatives, where it is chosen, and that models say the same with it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import native
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.mechanisms import attend
from easydel.native import library

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
# Of results that are averages of values of about 1: some roundings of float32.
TOLERANCE = 1e-6
SHAPES = [
    (1, 640, 9, 3, 64, 64),
    (3, 33, 6, 2, 24, 24),
    (2, 100, 4, 4, 7, 12),
    (1, 1, 2, 1, 8, 8),
    (5, 301, 8, 1, 40, 3),
]


def case(batch: int, slots: int, heads: int, kv_heads: int, dim: int, value_dim: int) -> tuple[np.ndarray, ...]:
    shapes = (batch, 1, heads, dim), (batch, slots, kv_heads, dim), (batch, slots, kv_heads, value_dim)
    seen = RNG.random((batch, slots)) < 0.7
    seen[:, slots // 2] = True
    return *(RNG.standard_normal(shape).astype(np.float32) for shape in shapes), seen


def in_float64(query: Any, key: Any, value: Any, seen: Any, scale: float, softcap: float | None) -> np.ndarray:
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x.astype(np.float64), group, axis=2) for x in (key, value))
    products = np.einsum("bhd,bthd->bht", query[:, 0].astype(np.float64), key) * scale
    if softcap is not None:
        products = softcap * np.tanh(products / softcap)
    products = np.where(seen[:, None], products, -np.inf)
    weights = np.exp(products - products.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bht,bthd->bhd", weights, value)[:, None]


def by_mask(arrays: Any, mechanism: str, scale: float = 0.3, softcap: float | None = None) -> jax.Array:
    query, key, value, seen = arrays
    mask = AttentionMask(key_valid=jnp.asarray(seen), causal=False)
    return attend(query, key, value, mask, mechanism=mechanism, scale=scale, softcap=softcap)[0]


def calls_kernel(function: Any, *args: Any) -> bool:
    return "easydel_one_query" in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_attention_in_float64(shape: tuple[int, ...], softcap: float | None) -> None:
    arrays = case(*shape)
    got = by_mask(arrays, "auto", 0.3, softcap)
    assert got.shape == (shape[0], 1, shape[2], shape[5])
    np.testing.assert_allclose(got, in_float64(*arrays, 0.3, softcap), atol=TOLERANCE, rtol=0)


def test_large_products_overflow_nothing_and_far_ones_weigh_nothing() -> None:
    query, key, value, seen = case(1, 200, 2, 1, 16, 16)
    arrays = query * 100, key, value, seen
    np.testing.assert_allclose(by_mask(arrays, "auto", 1.0), in_float64(*arrays, 1.0, None), atol=1e-4, rtol=0)


def test_a_row_that_sees_nothing_gets_zeros_and_disturbs_no_other() -> None:
    query, key, value, seen = case(2, 50, 4, 2, 8, 8)
    seen[0] = False
    got = by_mask((query, key, value, seen), "auto")
    np.testing.assert_array_equal(got[0], 0)
    alone = by_mask((query[1:], key[1:], value[1:], seen[1:]), "auto")
    np.testing.assert_allclose(got[1:], alone, atol=TOLERANCE, rtol=0)  # other parts of the slots are added up


def test_what_is_not_seen_is_not_read() -> None:
    query, key, value, seen = case(1, 64, 4, 2, 8, 8)
    seen[:] = False
    seen[0, 10:20] = True
    broken = key.copy(), value.copy()
    for array in broken:
        array[0, :10], array[0, 20:] = np.nan, np.inf
    got = by_mask((query, *broken, seen), "auto")
    np.testing.assert_array_equal(got, by_mask((query, key, value, seen), "auto"))


def test_derivatives_are_those_of_attention() -> None:
    query, key, value, seen = case(2, 20, 4, 2, 8, 8)

    def loss(mechanism: str, *arrays: jax.Array) -> jax.Array:
        return (by_mask((*arrays, seen), mechanism) ** 2).sum()

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, mechanism), (0, 1, 2)))(query, key, value)
        for mechanism in ("auto", "vanilla")
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)  # of sums of up to 20 terms of about 1


def test_it_is_chosen_for_one_query_in_float32_only() -> None:
    query, key, value, seen = case(1, 40, 4, 2, 8, 8)
    several = np.repeat(query, 2, axis=1)
    assert calls_kernel(lambda *x: by_mask((*x, seen), "auto"), query, key, value)
    assert not calls_kernel(lambda *x: by_mask((*x, seen), "vanilla"), query, key, value)
    assert not calls_kernel(lambda *x: by_mask((*x, seen), "auto"), several, key, value)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    assert not calls_kernel(lambda *x: by_mask((*x, seen), "auto"), *half)


# Gemma 2 has what Llama and Mistral have, a window in every other layer.
@pytest.mark.parametrize(
    "family", ["gemma2", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mistral"))]
)
def test_generation_is_the_same_without_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window, a soft-cap and cross-attention, and rows of different lengths."""
    model = make(family)
    ids = RNG.integers(2, 60, (2, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    if family != "t5":
        mask[0, :5] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    made = model.generate(**options).sequences
    monkeypatch.setattr(library, "is_available", lambda: False)
    plain = make(family, attn_block_size=64)  # another structure, so that nothing compiled before is used
    np.testing.assert_array_equal(made, plain.generate(**options).sequences)


def make(family: str, **fields: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    if family == "t5":
        t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        config = easydel.T5Config(**t5, decoder_start_token_id=0, eos_token_id=None, **fields)
        return easydel.T5ForConditionalGeneration(config, rngs=nnx.Rngs(0))
    names = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}
    own = {"llama": {}, "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8}}
    config = getattr(easydel, f"{names[family]}Config")(**sizes, **own[family], eos_token_id=None, **fields)
    return getattr(easydel, f"{names[family]}ForCausalLM")(config, rngs=nnx.Rngs(0))
