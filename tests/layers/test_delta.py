"""The gated delta rule by chunks and in one step, against float64 token by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.layers.delta import delta_scan, delta_step, unit_lower_inverse

HEADS, GROUPS, KEY, VALUE = 4, 2, 5, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


def draw(length: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(batch, length, GROUPS, KEY))
    return {
        "query": rng.normal(size=(batch, length, GROUPS, KEY)).astype(np.float32),
        "key": (key / np.linalg.norm(key, axis=-1, keepdims=True)).astype(np.float32),
        "value": rng.normal(size=(batch, length, HEADS, VALUE)).astype(np.float32),
        "log_decay": -rng.uniform(0.0, 1.5, (batch, length, HEADS)).astype(np.float32),
        "beta": rng.uniform(0.0, 1.0, (batch, length, HEADS)).astype(np.float32),
        "state": rng.normal(size=(batch, HEADS, KEY, VALUE)).astype(np.float32),
    }


def by_token(
    query: Any, key: Any, value: Any, log_decay: Any, beta: Any, state: Any, segments: Any = None, xp: Any = np
) -> Any:
    """Follow the definition, one token after the other, in the arrays' own precision."""
    query, key = (xp.repeat(array, HEADS // GROUPS, axis=2) for array in (query, key))
    outputs = []
    for t in range(value.shape[1]):
        if segments is not None:
            before = segments[:, t - 1] if t else 0 * segments[:, 0]
            state = state * (segments[:, t] == before)[:, None, None, None]
        state = state * xp.exp(log_decay[:, t])[..., None, None]
        new = beta[:, t][..., None] * (value[:, t] - xp.einsum("bhkv,bhk->bhv", state, key[:, t]))
        state = state + xp.einsum("bhk,bhv->bhkv", key[:, t], new)
        outputs.append(xp.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return xp.stack(outputs, axis=1), state


def exact(parts: dict[str, np.ndarray], segments: Any = None) -> Any:
    return by_token(**{name: array.astype(np.float64) for name, array in parts.items()}, segments=segments)


run = jax.jit(delta_scan, static_argnames="chunk_size")  # op by op it takes many times as long


@pytest.mark.parametrize(
    ("length", "chunk_size"),
    [(1, 64), (7, 1), pytest.param(8, 4, marks=pytest.mark.slow), (19, 8), (19, 256), (70, 64)],
)
def test_chunks_equal_single_tokens(length: int, chunk_size: int) -> None:
    parts = draw(length)
    y, state = run(**parts, chunk_size=chunk_size)
    want, last = exact(parts)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_one_step() -> None:
    parts = draw(1)
    want, last = exact(parts)
    y, state = delta_step(**{name: array if name == "state" else array[:, 0] for name, array in parts.items()})
    np.testing.assert_allclose(y, want[:, 0], **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_places_without_a_token_leave_the_state() -> None:
    parts = draw(12)
    kept = np.array([0, 3, 4, 9])
    gaps = np.zeros((1, 12, 1), np.float32)
    gaps[:, kept] = 1
    held = {name: parts[name] * gaps for name in ("log_decay", "beta")}
    y, state = run(**parts | held, chunk_size=5)
    want, last = exact({n: a if n == "state" else a[:, kept] for n, a in parts.items()})
    np.testing.assert_allclose(y[:, kept], want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


@pytest.mark.parametrize("chunk_size", [4, 32])
def test_segments_begin_anew(chunk_size: int) -> None:
    parts = draw(13)
    segments = np.array([[0] * 4 + [1] * 4 + [2] * 5, [0] * 3 + [1] + [2] * 9], np.int32)
    y, state = run(**parts, chunk_size=chunk_size, segments=segments)
    want, last = exact(parts, segments)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_the_same_key_again_and_again() -> None:
    """What is written then depends on all that was written before, undamped: powers of it would overflow."""
    parts = draw(64, batch=1)
    parts["key"][:] = parts["key"][:, :1]
    parts["log_decay"][:] = 0
    parts["beta"][:] = 1
    y, state = run(**parts)
    want, last = exact(parts)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_small_decays_after_strong_ones_are_not_lost() -> None:
    """A plain running sum of the decays' logarithms reaches thousands, where float32 counts by 2e-4."""
    parts = draw(256, batch=1)
    parts["log_decay"][:, ::4] = -97.3
    y, _ = run(**parts, chunk_size=256)
    want, _ = exact(parts)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 6, 8])
def test_inverse(size: int) -> None:
    lower = np.tril(np.random.default_rng(0).normal(size=(2, size, size)), -1)
    got = jax.jit(unit_lower_inverse)(jnp.asarray(lower, jnp.float32))
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(size) + lower), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "segments", [None, np.array([[0] * 3 + [1] * 3, [0] * 5 + [1]], np.int32)], ids=["one", "packed"]
)
def test_gradients(segments: Any) -> None:
    parts = {name: jnp.asarray(array) for name, array in draw(6).items()}

    def loss(run: Any, parts: dict[str, jax.Array]) -> jax.Array:
        y, state = run(parts)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

    got = jax.jit(jax.grad(lambda p: loss(lambda q: delta_scan(**q, chunk_size=4, segments=segments), p)))(parts)
    want = jax.jit(jax.grad(lambda p: loss(lambda q: by_token(**q, segments=segments, xp=jnp), p)))(parts)
    for name in parts:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_memory_grows_with_the_length_alone() -> None:
    def temporary(length: int) -> int:
        parts = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in draw(length, batch=1).items()}

        def loss(parts: dict[str, Any]) -> jax.Array:
            return jnp.sum(delta_scan(**parts)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(parts).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.1 * temporary(1024)
