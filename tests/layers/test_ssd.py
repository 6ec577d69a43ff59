"""The state-space recurrence by chunks, in one step and with its convolution, against float64 token by token."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.layers.places import Places
from easydel.layers.ssd import ssd_scan, ssd_step
from easydel.layers.ssm import causal_conv

HEADS, DIM, GROUPS, SIZE = 4, 3, 2, 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order


def draw(length: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, length, HEADS, DIM)).astype(np.float32),
        "dt": rng.uniform(0.01, 1.0, (batch, length, HEADS)).astype(np.float32),
        "A": -rng.uniform(0.1, 3.0, HEADS).astype(np.float32),
        "B": rng.normal(size=(batch, length, GROUPS, SIZE)).astype(np.float32),
        "C": rng.normal(size=(batch, length, GROUPS, SIZE)).astype(np.float32),
        "state": rng.normal(size=(batch, HEADS, DIM, SIZE)).astype(np.float32),
    }


def by_token(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any, segments: Any = None, xp: Any = np) -> Any:
    """Follow the definition, one token after the other, in the arrays' own precision."""
    B, C = (xp.repeat(array, HEADS // GROUPS, axis=2) for array in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        if segments is not None:
            before = segments[:, t - 1] if t else 0 * segments[:, 0]
            state = state * (segments[:, t] == before)[:, None, None, None]
        state = state * xp.exp(dt[:, t] * A)[..., None, None] + xp.einsum(
            "bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t]
        )
        outputs.append(xp.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return xp.stack(outputs, axis=1), state


def exact(parts: dict[str, np.ndarray], segments: Any = None) -> Any:
    return by_token(**{name: array.astype(np.float64) for name, array in parts.items()}, segments=segments)


CHUNKS = [(1, 4), (7, 1), (8, 4), (19, 8), (19, 256)]  # length and chunk size
OTHERS = [sizes for sizes in itertools.product((1, 7, 8, 19), (1, 4, 8, 256)) if sizes not in CHUNKS]
run = jax.jit(ssd_scan, static_argnames="chunk_size")  # op by op it takes many times as long


@pytest.mark.parametrize(
    ("length", "chunk_size"), [*CHUNKS, *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in OTHERS)]
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
    y, state = ssd_step(
        *(parts[n][:, 0] for n in ("x", "dt")), parts["A"], parts["B"][:, 0], parts["C"][:, 0], parts["state"]
    )
    np.testing.assert_allclose(y, want[:, 0], **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_time_steps_of_zero_leave_the_state() -> None:
    parts = draw(12)
    kept = np.array([0, 3, 4, 9])
    gaps = np.zeros((1, 12, 1), np.float32)
    gaps[:, kept] = 1
    y, state = run(**parts | {"dt": parts["dt"] * gaps}, chunk_size=5)
    want, last = exact({n: a[:, kept] if n in ("x", "dt", "B", "C") else a for n, a in parts.items()})
    np.testing.assert_allclose(y[:, kept], want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.slow), 4, 32])
def test_segments_begin_anew(chunk_size: int) -> None:
    parts = draw(13)
    segments = np.array([[0] * 4 + [1] * 4 + [2] * 5, [0] * 3 + [1] + [2] * 9], np.int32)
    y, state = run(**parts, chunk_size=chunk_size, segments=segments)
    want, last = exact(parts, segments)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(state, last, **CLOSE)


def test_small_decays_after_strong_ones_are_not_lost() -> None:
    """A plain running sum of the decays' logarithms reaches thousands, where float32 counts by 2e-4."""
    parts = draw(256, batch=1)
    parts["A"][:] = -1.0
    parts["dt"][:, ::4] = 97.3
    y, _ = run(**parts, chunk_size=256)
    want, _ = exact(parts)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    "segments", [None, np.array([[0] * 3 + [1] * 4, [0] * 5 + [1] * 2], np.int32)], ids=["one", "packed"]
)
def test_gradients(segments: Any) -> None:
    parts = {name: jnp.asarray(array) for name, array in draw(7).items()}

    def loss(run: Any, parts: dict[str, jax.Array]) -> jax.Array:
        y, state = run(parts)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

    got = jax.jit(jax.grad(lambda p: loss(lambda q: ssd_scan(**q, chunk_size=4, segments=segments), p)))(parts)
    want = jax.jit(jax.grad(lambda p: loss(lambda q: by_token(**q, segments=segments, xp=jnp), p)))(parts)
    for name in parts:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_memory_grows_with_the_length_alone() -> None:
    def temporary(length: int) -> int:
        parts = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in draw(length, batch=1).items()}

        def loss(parts: dict[str, Any]) -> jax.Array:
            return jnp.sum(ssd_scan(**parts, chunk_size=64)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(parts).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.1 * temporary(2048)


@pytest.mark.parametrize(
    ("size", "bias"),
    [
        (1, True),
        (2, False),
        (4, True),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, False), (2, True), (4, False))),
    ],
)
def test_convolution(size: int, bias: bool) -> None:
    rng = np.random.default_rng(0)
    inputs, window = rng.normal(size=(2, 6, 3)).astype(np.float32), rng.normal(size=(2, size - 1, 3)).astype(np.float32)
    kernel, offset = rng.normal(size=(size, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32) * bias
    seen = np.concatenate([window, inputs], axis=1)
    want = np.stack([(seen[:, t : t + size] * kernel).sum(axis=1) + offset for t in range(6)], axis=1)
    np.testing.assert_allclose(causal_conv(inputs, kernel, offset if bias else None, window), want, **CLOSE)
    parts = [causal_conv(inputs[:1, part], kernel, offset, 0 * window[:1]) for part in (slice(0, 2), slice(2, 6))]
    packed = causal_conv(inputs[:1], kernel, offset, 0 * window[:1], jnp.array([[0, 0, 1, 1, 1, 1]]))
    np.testing.assert_allclose(packed, np.concatenate(parts, axis=1), **CLOSE)


def test_places() -> None:
    tokens = jnp.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    x = jnp.arange(30.0).reshape(3, 5, 2)
    places = Places.of(tokens, jnp.array([[9, 7, 9, 7, 2], [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]]))
    front = places.gather(x)
    np.testing.assert_array_equal(front[0, :3], x[0, jnp.array([1, 3, 4])])
    np.testing.assert_array_equal(places.scatter(front), x)
    np.testing.assert_array_equal(places.count, [3, 3, 0])
    np.testing.assert_array_equal(places.segments[0, :3], [0, 0, 1])
    weights = jnp.arange(5.0)[None, :, None]
    gradient = jax.grad(lambda x: jnp.sum(weights * places.gather(x)))(x)
    np.testing.assert_array_equal(
        gradient, jnp.broadcast_to(places.scatter(jnp.broadcast_to(weights, x.shape)), x.shape)
    )
    assert Places.of(None, None).gather(x) is x
