"""Biases of positions: buckets and slopes against transformers', and every mechanism against a float64 reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.t5.modeling_t5 import T5Attention

from easydel.layers import AttentionMask, KeyBias, RelativePositions, alibi_slopes, counted
from easydel.layers.attention import attend
from easydel.layers.attention.bias import buckets

SETTINGS = [(32, 128), (8, 20), (16, 64), (64, 1000), (6, 9), (7, 40)]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "max_distance"), SETTINGS)
def test_buckets_are_transformers_own(count: int, max_distance: int, bidirectional: bool) -> None:
    distances = np.arange(-1200, 1200)  # a distance counts backwards, a relative position forwards
    want = T5Attention._relative_position_bucket(torch.from_numpy(-distances), bidirectional, count, max_distance)
    np.testing.assert_array_equal(buckets(distances, count, max_distance, bidirectional), want.numpy())


def positions(bidirectional: bool, heads: int = 6) -> RelativePositions:
    return RelativePositions(
        8, heads, max_distance=10, bidirectional=bidirectional, init_stddev=2.0, param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def reference(q: Any, k: Any, v: Any, table: np.ndarray, offset: int, causal: bool) -> np.ndarray:
    """Return attention in float64, one product, bias and softmax at a time."""
    q, k, v, table = (np.asarray(x, np.float64) for x in (q, k, v, table))
    group, out = q.shape[2] // k.shape[2], np.zeros(q.shape)
    distances = (offset + np.arange(q.shape[1]))[:, None] - np.arange(k.shape[1])
    places = buckets(distances, 8, 10, not causal)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        products = q[b, :, h] @ k[b, :, h // group].T + table[places, h]
        products = np.where(distances < 0, -1e300, products) if causal else products
        powers = np.exp(products - products.max(axis=-1, keepdims=True))
        out[b, :, h] = powers / powers.sum(axis=-1, keepdims=True) @ v[b, :, h // group]
    return out


@pytest.mark.parametrize("mechanism", ["vanilla", "sdpa", "blockwise", "auto"])
@pytest.mark.parametrize(("causal", "queries", "offset"), [(True, 23, None), (False, 23, None), (True, 3, 15)])
def test_bias_is_added_by_every_mechanism(mechanism: str, causal: bool, queries: int, offset: int | None) -> None:
    made = positions(bidirectional=not causal)
    q, k, v = (RNG.normal(size=(2, n, heads, 8)).astype(np.float32) for n, heads in ((queries, 6), (23, 2), (23, 2)))
    mask = AttentionMask(causal=causal, offset=None if offset is None else jnp.asarray(offset, jnp.int32))
    run = jax.jit(lambda *a: attend(*a[:4], bias=a[4], mechanism=mechanism, scale=1.0, block_size=4)[0])
    want = reference(q, k, v, made.embedding.get_value(), offset or 0, causal)
    np.testing.assert_allclose(run(q, k, v, mask, made()), want, atol=2e-5, rtol=2e-5)


def test_a_ring_s_keys_get_the_bias_of_their_slots() -> None:
    bias, slots = positions(bidirectional=False)(), np.asarray([4, 5, 2, 3, -1], np.int32)
    whole = bias(AttentionMask(), range(5, 6), range(6))
    ring = bias(AttentionMask(offset=np.int32(5)).over(slots), range(1), range(5))
    np.testing.assert_array_equal(ring[..., :4], whole[..., slots[:4]])


@pytest.mark.parametrize(("count", "max_distance"), [(3, 10), (16, 4)])
def test_buckets_that_do_not_reach_are_refused(count: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match="relative positions need"):
        RelativePositions(
            count, 2, max_distance=max_distance, bidirectional=True, init_stddev=1.0, param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )  # fmt: skip


def alibi_reference(q: Any, k: Any, v: Any, slopes: Any, places: Any, seen: Any) -> np.ndarray:
    """Return attention in float64 with biases by how far apart tokens lie, `seen` `[batch, queries, keys]`."""
    q, k, v, slopes = (np.asarray(x, np.float64) for x in (q, k, v, slopes))
    distances = places[:, -q.shape[1] :, None] - places[:, None]
    products = np.einsum("bqhd,bkhd->bhqk", q, k) - slopes[:, None, None] * distances[:, None]
    products = np.where(seen[:, None], products, -np.inf)
    powers = np.exp(products - products.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", powers / powers.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 11, 64])
def test_slopes_of_alibi_are_transformers_own(heads: int) -> None:
    want = _get_alibi_slopes(heads, torch.device("cpu"))
    np.testing.assert_allclose(alibi_slopes(heads), want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("mechanism", ["vanilla", "sdpa", "blockwise", "auto"])
@pytest.mark.parametrize("cached", [False, True])
def test_alibi_counts_tokens_in_every_mechanism(mechanism: str, cached: bool) -> None:
    """Padding left, right and between tokens is not counted, also where a cache gives keys out of their order."""
    queries, keys = (3, 23) if cached else (23, 23)
    q, k, v = (RNG.normal(size=(2, n, 6, 8)).astype(np.float32) for n in (queries, keys, keys))
    valid = np.ones((2, keys), bool)
    valid[0, :4] = valid[1, 9:12] = False
    valid[1, 18] = False
    places = np.cumsum(valid, axis=1) - 1
    seen = valid[:, None] & (np.arange(keys)[None, keys - queries :, None] >= np.arange(keys))
    whole = AttentionMask(key_valid=jnp.asarray(valid), offset=jnp.int32(keys - queries) if cached else None)
    slopes = alibi_slopes(6)
    bias = KeyBias(slopes[:, None] * counted(whole, keys)[:, None])
    order = RNG.permutation(keys) if cached else np.arange(keys)
    mask = whole.over(jnp.asarray(order, jnp.int32)) if cached else whole
    run = jax.jit(lambda *a: attend(*a[:4], bias=a[4], mechanism=mechanism, scale=1.0, block_size=4)[0])
    got = np.asarray(run(q, k[:, order], v[:, order], mask, bias))
    told = valid[:, -queries:]
    want = alibi_reference(q, k, v, slopes, places, np.where(told[..., None], seen, True))
    np.testing.assert_allclose(got[told], want[told], atol=2e-5, rtol=2e-5)
