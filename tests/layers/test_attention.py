"""Every attention mechanism against a float64 reference written as loops over heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import easydel
from easydel.layers.attention import AttentionMask, attend

TOLERANCE = 2e-5  # float32 against float64: a softmax over a few dozen products
RNG = np.random.default_rng(0)


def reference(q: Any, k: Any, v: Any, visible: np.ndarray, scale: float, softcap: float | None) -> tuple[Any, Any]:
    """Return output and weights; `visible` is bool `[batch, queries, keys]`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out, weights = np.zeros((*q.shape[:3], v.shape[3])), np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            products = q[b, :, h] @ k[b, :, h // group].T * scale
            products = products if softcap is None else softcap * np.tanh(products / softcap)
            products = np.where(visible[b], products, -1e300)
            powers = np.exp(products - products.max(axis=-1, keepdims=True))
            weights[b, h] = powers / powers.sum(axis=-1, keepdims=True)
            out[b, :, h] = weights[b, h] @ v[b, :, h // group]
    return out, weights


def inputs(queries: int, keys: int, heads: int, kv_heads: int, dim: int = 8) -> list[np.ndarray]:
    shapes = [(2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim)]
    return [RNG.normal(size=shape).astype(np.float32) for shape in shapes]


def slots(queries: int, keys: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return offset + np.arange(queries)[None, :, None], np.arange(keys)[None, None, :]


CASES = ("causal", "bidirectional", "window", "padding", "segments", "cache", "cache_window", "everything", "sides")


def mask_and_visible(case: str, queries: int, keys: int) -> tuple[AttentionMask, np.ndarray]:
    offset = keys - queries - 2 if "cache" in case else 0
    i, j = slots(queries, keys, offset)
    visible, mask = np.broadcast_to(j <= i, (2, queries, keys)), AttentionMask()
    if case == "bidirectional":
        return replace(mask, causal=False), np.ones((2, queries, keys), bool)
    if case == "sides":
        return AttentionMask(causal=False, window=5), np.broadcast_to(np.abs(i - j) < 5, (2, queries, keys))
    if "cache" in case:
        mask = replace(mask, offset=np.int32(offset))
    if case in ("window", "cache_window", "everything"):
        mask, visible = mask.with_window(5), visible & (j > i - 5)
    if case in ("padding", "everything"):
        valid = np.ones((2, keys), bool)
        valid[0, -3:] = valid[1, -6:] = False
        mask, visible = replace(mask, key_valid=valid), visible & valid[:, None]
    if case in ("segments", "everything"):
        segments = np.stack([np.arange(keys) // 7, np.arange(keys) // 4]).astype(np.int32)
        mask = replace(mask, query_segments=segments, key_segments=segments)
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    return mask, visible


# "everything" and "cache_window" have these together.
PARTS = ("window", "padding", "segments", "cache")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in PARTS else []) for case in CASES]
)
@pytest.mark.parametrize("mechanism", ["vanilla", "sdpa", "blockwise", "auto"])
def test_equals_the_reference(mechanism: str, case: str) -> None:
    queries, keys = (5, 24) if "cache" in case else (23, 23)
    q, k, v = inputs(queries, keys, heads=6, kv_heads=2)
    mask, visible = mask_and_visible(case, queries, keys)
    run = jax.jit(lambda *a: attend(*a, mechanism=mechanism, scale=0.3, block_size=4)[0])
    want, _ = reference(q, k, v, visible, 0.3, None)
    rows = visible.any(axis=-1)  # a query that sees nothing gives some finite number
    got = np.asarray(run(q, k, v, mask))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[rows], want[rows], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("mechanism", ["vanilla", "blockwise", "auto"])
def test_softcap(mechanism: str) -> None:
    q, k, v = inputs(9, 9, 4, 2)
    mask, visible = mask_and_visible("causal", 9, 9)
    run = jax.jit(lambda *a: attend(*a, mechanism=mechanism, scale=1.0, softcap=2.0, block_size=4)[0])
    got = run(q, k, v, mask)
    np.testing.assert_allclose(got, reference(q, k, v, visible, 1.0, 2.0)[0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("mechanism", ["vanilla", "sdpa", "blockwise", "auto"])
def test_weights(mechanism: str) -> None:
    q, k, v = inputs(9, 9, 4, 2)
    mask, visible = mask_and_visible("causal", 9, 9)
    run = jax.jit(lambda *a: attend(*a, mechanism=mechanism, scale=0.3, return_weights=True)[1])
    weights = run(q, k, v, mask)
    np.testing.assert_allclose(weights, reference(q, k, v, visible, 0.3, None)[1], atol=TOLERANCE)
    assert attend(q, k, v, mask, mechanism=mechanism, scale=0.3)[1] is None


def test_sdpa_refuses_what_it_cannot_do() -> None:
    q, k, v = inputs(3, 3, 2, 2)
    with pytest.raises(easydel.UnsupportedError, match="soft-capping"):
        attend(q, k, v, AttentionMask(), mechanism="sdpa", scale=1.0, softcap=2.0)
    with pytest.raises(easydel.UnsupportedError, match="dropout"):
        attend(q, k, v, AttentionMask(), mechanism="sdpa", scale=1.0, dropout=lambda x: x)


def test_gradients_of_the_mechanisms_agree() -> None:
    q, k, v = inputs(9, 9, 4, 2)
    mask, _ = mask_and_visible("everything", 9, 9)

    def loss(parts: Any, mechanism: str) -> jax.Array:
        return (attend(*parts, mask, mechanism=mechanism, scale=0.3, block_size=4)[0][:, :3] ** 2).sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    want = gradients((q, k, v), "vanilla")
    for mechanism in ("sdpa", "blockwise"):
        for got, expected in zip(gradients((q, k, v), mechanism), want, strict=True):
            np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_leaves_out_only_keys_it_cannot_see(causal: bool, window: int | None) -> None:
    mask = AttentionMask(causal=causal, window=window)
    everything = mask.visible(range(20), range(20))
    full = np.ones((20, 20), bool) if everything is None else np.asarray(everything)[0, 0]
    for start in range(0, 20, 6):
        queries = range(start, min(start + 6, 20))
        keys = mask.key_range(queries, 20)
        outside = np.ones(20, bool)
        outside[keys.start : keys.stop] = False
        assert not full[queries.start : queries.stop][:, outside].any()
        assert len(keys) > 0
