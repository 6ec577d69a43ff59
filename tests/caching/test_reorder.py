"""Rows of a cache in another order: every array of every kind goes with its row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.caching import (
    AttentionCache,
    Cache,
    CrossAttentionCache,
    EncoderDecoderCache,
    LatentCache,
    QuantizedStates,
    RecurrentCache,
    SlidingCache,
    StackedCaches,
)

BATCH = 3
ROWS = np.array([2, 0, 0, 1, 2], np.int32)


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


ATTENTION = AttentionCache(numbers(BATCH, 4, 2, 3), numbers(BATCH, 4, 2, 3))
CROSS = CrossAttentionCache(numbers(BATCH, 5, 2, 3), numbers(BATCH, 5, 2, 3), numbers(BATCH, 5) > 0)
LAYERS: dict[str, Any] = {
    "attention": ATTENTION,
    "sliding": SlidingCache(numbers(BATCH, 2, 2, 3), numbers(BATCH, 2, 2, 3), window=2),
    "recurrent": RecurrentCache(numbers(BATCH, 3, 6), numbers(BATCH, 2, 4, 5)),
    "encoder and decoder": EncoderDecoderCache(ATTENTION, CROSS),
    "latent": LatentCache((numbers(BATCH, 4, 1, 7),)),
    "latent int8": LatentCache(tuple(QuantizedStates.of(numbers(BATCH, 4, 1, size)) for size in (4, 3))),
}


def cache_of(layers: Any) -> Cache:
    empty = Cache.create(layers, BATCH, 4, jnp.arange(BATCH, dtype=jnp.int32))
    return empty.extend(jnp.array([[0, 1], [1, 1], [1, 0]]), BATCH, 2)[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_go_where_they_are_named(kind: str) -> None:
    cache = cache_of((LAYERS[kind], LAYERS[kind]))
    got = cache.reorder(ROWS)
    assert jax.tree.structure(got) == jax.tree.structure(cache)
    assert int(got.index) == 2
    for name in ("valid", "seen", "starts"):
        np.testing.assert_array_equal(getattr(got, name), np.asarray(getattr(cache, name))[ROWS])
    for one, other in zip(jax.tree.leaves(got.layers), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other)[ROWS])


def test_of_layers_in_a_scan() -> None:
    stack = jax.tree.map(lambda a: jnp.stack([a, -a]), ATTENTION)
    got = cache_of(StackedCaches({"0:2:1": stack})).reorder(ROWS)
    np.testing.assert_array_equal(got.layers[1].key, -np.asarray(ATTENTION.key)[ROWS])
    assert got.valid is not None
    assert got.valid.shape == (5, 4)


def test_of_layers_that_keep_no_slots() -> None:
    cache = Cache.create((LAYERS["recurrent"],), BATCH, None, jnp.zeros(BATCH, jnp.int32))
    assert cache.reorder(ROWS).valid is None
