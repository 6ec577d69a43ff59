"""`SlidingCache`: a ring of the window's size gives what a full cache gives under the window's mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.caching import AttentionCache, SlidingCache
from easydel.layers.attention import AttentionMask, attend

WINDOW, LENGTH = 5, 23
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(2, LENGTH, 2, 4)).astype(np.float32) for _ in range(3))
VALID = RNG.random((2, LENGTH)) < 0.8
VALID[:, ::3] = True  # no window without any token


@jax.jit
def step(query: Any, key: Any, value: Any, cache: Any, done: Any) -> Any:
    """Compiled once for each kind of cache and number of tokens: op by op it takes many times as long."""
    cache, keys, values, mask = cache.extend(key, value, AttentionMask(key_valid=jnp.asarray(VALID), offset=done))
    mask = mask.with_window(WINDOW)
    return cache, attend(query, keys, values, mask, mechanism="auto", scale=0.5, block_size=2)[0]


def run(cache: AttentionCache | SlidingCache, chunks: tuple[int, ...], grow: int | None = None) -> np.ndarray:
    """Feed the tokens in chunks; return what all queries attended to."""
    outputs, done = [], 0
    for size in chunks:
        if grow and done + size > WINDOW - 1 and isinstance(cache, SlidingCache):
            cache = cache.grow(grow)
        part = slice(done, done + size)
        start = None if done == 0 else jnp.int32(done)
        cache, out = step(QUERY[:, part], KEY[:, part], VALUE[:, part], cache, start)
        outputs.append(np.asarray(out))
        done += size
    return np.concatenate(outputs, axis=1)


@functools.cache
def whole() -> np.ndarray:
    return run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), (LENGTH,))


@pytest.mark.parametrize(
    "chunks",
    [
        (1,) * LENGTH,
        pytest.param((3, *(1,) * (LENGTH - 3)), marks=pytest.mark.slow),
        (5, 5, 5, 5, 3),
        (9, 1, 1, 2, 7, 3),
        pytest.param((4, 12, 1, 6), marks=pytest.mark.slow),
        (LENGTH,),
        pytest.param((LENGTH - 1, 1), marks=pytest.mark.slow),
        (1, LENGTH - 1),
    ],
)
def test_equals_a_full_cache(chunks: tuple[int, ...]) -> None:
    full = run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), chunks)
    ring = run(SlidingCache.create(2, LENGTH, WINDOW, 2, 4, np.float32), chunks)
    np.testing.assert_allclose(ring, full, atol=1e-6)
    np.testing.assert_allclose(ring, whole(), atol=1e-6)


def test_it_holds_a_window() -> None:
    cache = SlidingCache.create(2, 1000, WINDOW, 2, 4, np.float32)
    assert cache.key.nbytes + cache.value.nbytes == 2 * 2 * WINDOW * 2 * 4 * 4
    assert SlidingCache.create(2, 3, WINDOW, 2, 4, np.float32).size == 3, "no more than the sequence"


def test_grow() -> None:
    small = SlidingCache.create(2, 3, WINDOW, 2, 4, np.float32)
    assert small.grow(4).size == 4
    assert small.grow(100).size == small.grow(100).grow(200).size == WINDOW
    np.testing.assert_allclose(
        run(SlidingCache.create(2, 4, WINDOW, 2, 4, np.float32), (4, *(1,) * (LENGTH - 4)), grow=LENGTH),
        whole(),
        atol=1e-6,
    )
