"""Mamba's recurrence by chunks, token by token and at once, against float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.layers.selective_scan import selective_scan, selective_step

CHANNELS, SIZE = 4, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
FORMS = pytest.mark.parametrize("in_parallel", [False, True])


def draw(length: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, length, CHANNELS)).astype(np.float32),
        "dt": rng.uniform(0.01, 1.0, (batch, length, CHANNELS)).astype(np.float32),
        "A": -rng.uniform(0.1, 3.0, (CHANNELS, SIZE)).astype(np.float32),
        "B": rng.normal(size=(batch, length, SIZE)).astype(np.float32),
        "C": rng.normal(size=(batch, length, SIZE)).astype(np.float32),
        "state": rng.normal(size=(batch, CHANNELS, SIZE)).astype(np.float32),
    }


def by_token(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, segments: Any = None, xp: Any = np) -> Any:
    """Follow the definition, one token after the other, in the arrays' own precision."""
    outputs = []
    for t in range(x.shape[1]):
        if segments is not None:
            before = segments[:, t - 1] if t else 0 * segments[:, 0]
            state = state * (segments[:, t] == before)[:, None, None]
        state = state * xp.exp(dt[:, t, :, None] * A) + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append(xp.einsum("bcn,bn->bc", state, C[:, t]))
    return xp.stack(outputs, axis=1), state


def exact(parts: dict[str, np.ndarray], segments: Any = None) -> Any:
    return by_token(**{name: array.astype(np.float64) for name, array in parts.items()}, segments=segments)


# Op by op it takes many times as long.
run = jax.jit(selective_scan, static_argnames=("chunk_size", "in_parallel"))


@FORMS
@pytest.mark.parametrize(
    ("length", "chunk_size"), [(1, 4), (19, 1), (19, 8), pytest.param(16, 8, marks=pytest.mark.slow), (19, 256)]
)
def test_chunks_equal_single_tokens(length: int, chunk_size: int, in_parallel: bool) -> None:
    parts = draw(length)
    y, state = run(**parts, chunk_size=chunk_size, in_parallel=in_parallel)
    want, last = exact(parts)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_one_step() -> None:
    parts = draw(1)
    want, last = exact(parts)
    y, state = selective_step(**{n: a[:, 0] if n in ("x", "dt", "B", "C") else a for n, a in parts.items()})
    np.testing.assert_allclose(y, want[:, 0], **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


@FORMS
def test_time_steps_of_zero_leave_the_state(in_parallel: bool) -> None:
    parts = draw(12)
    kept = np.array([0, 3, 4, 9])
    gaps = np.zeros((1, 12, 1), np.float32)
    gaps[:, kept] = 1
    y, state = run(**parts | {"dt": parts["dt"] * gaps}, chunk_size=5, in_parallel=in_parallel)
    want, last = exact({n: a[:, kept] if n in ("x", "dt", "B", "C") else a for n, a in parts.items()})
    np.testing.assert_allclose(y[:, kept], want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


@FORMS
def test_strong_and_long_decays_are_exact(in_parallel: bool) -> None:
    """Products of decays come to nothing in the end, and nothing is divided by them."""
    parts = draw(256, batch=1)
    parts["dt"][:, ::4] = 97.3
    y, _ = run(**parts, chunk_size=256, in_parallel=in_parallel)
    want, _ = exact(parts)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@FORMS
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_outputs_and_gradients_of_segments(packed: bool, in_parallel: bool) -> None:
    segments = np.array([[0] * 4 + [1] * 4 + [2] * 3, [0] * 9 + [1] * 2], np.int32) if packed else None
    parts = {name: jnp.asarray(array) for name, array in draw(11).items()}

    def loss(run: Any, parts: dict[str, jax.Array]) -> Any:
        y, state = run(**parts, segments=segments)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state**2), (y, state)

    def scan(**parts: Any) -> Any:
        return selective_scan(**parts, chunk_size=4, in_parallel=in_parallel)

    got, outputs = jax.jit(jax.grad(lambda p: loss(scan, p), has_aux=True))(parts)
    want = jax.jit(jax.grad(lambda p: loss(lambda **q: by_token(**q, xp=jnp), p)[0]))(parts)
    for name in parts:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    for one, other in zip(outputs, exact(draw(11), segments), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@FORMS
def test_memory_is_that_of_a_chunk_and_of_the_states_between(in_parallel: bool) -> None:
    def temporary(length: int, chunk_size: int) -> int:
        parts = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in draw(length, batch=1).items()}

        def loss(parts: dict[str, Any]) -> jax.Array:
            return jnp.sum(selective_scan(**parts, chunk_size=chunk_size, in_parallel=in_parallel)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(parts).compile().memory_analysis().temp_size_in_bytes

    long = temporary(1024, 32)
    assert long < 2.1 * temporary(512, 32)
    assert long < temporary(1024, 1024) / 2
