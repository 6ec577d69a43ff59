"""`RecurrentCache`: the last tokens whatever padding stands between them, in a size that never changes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from easydel.caching import RecurrentCache


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_the_window_holds_the_last_tokens(kernel: int) -> None:
    empty = RecurrentCache.create(2, kernel, 3, (2, 4, 5), jnp.float32)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    state = jnp.ones((2, 2, 4, 5))
    cache = empty.advance(inputs, jnp.array([6, 2]), state)
    rows = [
        np.concatenate([np.zeros((kernel - 1, 3)), row[:n]]) for row, n in zip(np.asarray(inputs), (6, 2), strict=True)
    ]
    want = np.stack([row[len(row) - kernel + 1 :] for row in rows])
    np.testing.assert_array_equal(cache.window, want)
    np.testing.assert_array_equal(cache.state, state)
    unchanged = cache.advance(inputs, jnp.array([0, 0]), cache.state)
    np.testing.assert_array_equal(unchanged.window, cache.window)
    np.testing.assert_array_equal(empty.advance(inputs, None, state).window, inputs[:, 7 - kernel :])


def test_it_has_room_for_any_length() -> None:
    cache = RecurrentCache.create(2, 4, 3, (2, 4, 5), jnp.bfloat16)
    assert cache.grow(10**9) is cache
    assert (cache.window.nbytes, cache.state.nbytes) == (2 * 3 * 3 * 2, 2 * 2 * 4 * 5 * 4)
