"""`SlidingCache`: a ring of the window's size gives what a full cache gives under the window's mask."""

from __future__ import annotations

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


def run(cache: AttentionCache | SlidingCache, chunks: tuple[int, ...], grow: int | None = None) -> np.ndarray:
    """Feed the tokens in chunks; return what all queries attended to."""
    outputs, done = [], 0
    for size in chunks:
        if grow and done + size > WINDOW - 1 and isinstance(cache, SlidingCache):
            cache = cache.grow(grow)
        part = slice(done, done + size)
        mask = AttentionMask(key_valid=jnp.asarray(VALID), offset=None if done == 0 else jnp.int32(done))
        cache, keys, values, mask = cache.extend(KEY[:, part], VALUE[:, part], mask)
        out, _ = attend(
            QUERY[:, part], keys, values, mask.with_window(WINDOW), mechanism="auto", scale=0.5, block_size=2
        )
        outputs.append(np.asarray(out))
        done += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    "chunks",
    [
        (1,) * LENGTH,
        (3, *(1,) * (LENGTH - 3)),
        (5, 5, 5, 5, 3),
        (9, 1, 1, 2, 7, 3),
        (4, 12, 1, 6),
        (LENGTH,),
        (LENGTH - 1, 1),
        (1, LENGTH - 1),
    ],
)
def test_equals_a_full_cache(chunks: tuple[int, ...]) -> None:
    full = run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), chunks)
    ring = run(SlidingCache.create(2, LENGTH, WINDOW, 2, 4, np.float32), chunks)
    whole = run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), (LENGTH,))
    np.testing.assert_allclose(ring, full, atol=1e-6)
    np.testing.assert_allclose(ring, whole, atol=1e-6)


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
        run(AttentionCache.create(2, LENGTH, 2, 4, np.float32), (LENGTH,)),
        atol=1e-6,
    )
