"""Attention sinks: every mechanism against a float64 softmax with one more column."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import easydel
from easydel.layers.attention import AttentionMask, attend
from tests.layers.test_attention import TOLERANCE, inputs, mask_and_visible

SINKS = np.array([-3.0, 0.0, 2.0, 200.0], np.float32)  # the last: nearly all weight goes nowhere


def reference(q: Any, k: Any, v: Any, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return output and weights."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    products = np.where(visible[:, None], np.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e300)
    column = np.broadcast_to(SINKS[None, :, None, None], (*products.shape[:3], 1))
    joined = np.concatenate([products, column], axis=-1)
    powers = np.exp(joined - joined.max(axis=-1, keepdims=True))
    weights = (powers / powers.sum(axis=-1, keepdims=True))[..., :-1]
    return np.einsum("bhqk,bkhd->bqhd", weights, v), weights


@pytest.mark.parametrize("case", ["causal", "cache_window", "everything"])
@pytest.mark.parametrize("mechanism", ["vanilla", "blockwise", "auto"])
def test_equals_the_reference(mechanism: str, case: str) -> None:
    queries, keys = (5, 24) if "cache" in case else (17, 17)
    q, k, v = inputs(queries, keys, heads=4, kv_heads=2)
    mask, visible = mask_and_visible(case, queries, keys)
    run = jax.jit(lambda *a: attend(*a, mechanism=mechanism, scale=0.3, block_size=4, sinks=SINKS)[0])
    # A query that sees nothing has its sink to look at: zero.
    np.testing.assert_allclose(run(q, k, v, mask), reference(q, k, v, visible)[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_new_tokens_behind_a_cache() -> None:
    """As a cache gives its keys: those written before, and then the new ones."""
    q, k, v = inputs(5, 16 + 5, heads=4, kv_heads=2)
    held = np.concatenate([np.arange(9), np.full(7, -1), 9 + np.arange(5)]).astype(np.int32)
    mask = replace(AttentionMask(), offset=np.int32(9)).over(held, own=5)
    i, j = np.arange(5)[:, None], np.arange(21)[None]
    visible = np.broadcast_to((j < 9) | ((j >= 16) & (j - 16 <= i)), (2, 5, 21))
    run = jax.jit(lambda *a: attend(*a, mechanism="auto", scale=0.3, block_size=4, sinks=SINKS)[0])
    got = run(q, k, v, mask)
    np.testing.assert_allclose(got, reference(q, k, v, visible)[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_weights_leave_the_sink_out() -> None:
    q, k, v = inputs(9, 9, 4, 2)
    mask, visible = mask_and_visible("causal", 9, 9)
    run = jax.jit(lambda *a: attend(*a, mechanism="auto", scale=0.3, sinks=SINKS, return_weights=True)[1])
    weights = run(q, k, v, mask)
    np.testing.assert_allclose(weights, reference(q, k, v, visible)[1], atol=TOLERANCE)


def test_gradients_of_the_mechanisms_agree_and_are_finite() -> None:
    q, k, v = inputs(9, 9, 4, 2)
    mask, _ = mask_and_visible("everything", 9, 9)

    def loss(parts: Any, sinks: Any, mechanism: str) -> jax.Array:
        return (attend(*parts, mask, mechanism=mechanism, scale=0.3, block_size=4, sinks=sinks)[0] ** 2).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    want, got = (jax.tree.leaves(gradients((q, k, v), SINKS, name)) for name in ("vanilla", "blockwise"))
    assert np.abs(want[-1][:3]).min() > 1e-3, "sinks without a gradient test nothing"
    for one, other in zip(got, want, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_jax_s_own_attention_refuses_them() -> None:
    q, k, v = inputs(4, 4, 4, 2)
    with pytest.raises(easydel.UnsupportedError, match="sinks"):
        attend(q, k, v, AttentionMask(), mechanism="sdpa", scale=1.0, sinks=SINKS)
