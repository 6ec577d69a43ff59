"""Attention that looks both ways: every mechanism against a float64 softmax, and no cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel.layers import Attention, AttentionMask, LayerInputs

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 10, 8)).astype(np.float32)
VALID = np.array([[1] * 10, [0] * 3 + [1] * 5 + [0] * 2], bool)


def layer(mechanism: str) -> Attention:
    return Attention(
        8, 2, 2, 4, causal=False, mechanism=mechanism, block_size=3, dtype=jnp.float32, param_dtype=jnp.float32,
        precision=None, init_stddev=0.5, rngs=nnx.Rngs(0),
    )  # fmt: skip


def naive(attention: Attention) -> np.ndarray:
    q, k, v, o = (
        np.asarray(getattr(attention, f"{name}_proj").kernel.get_value(), np.float64) for name in ("q", "k", "v", "o")
    )
    x = HIDDEN.astype(np.float64)
    out = np.zeros_like(x)
    for row in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            products = (x[row] @ q)[:, head] @ (x[row] @ k)[:, head].T / 2.0
            weights = np.exp(products) * VALID[row]
            out[row, :, head] = weights / weights.sum(-1, keepdims=True) @ (x[row] @ v)[:, head]
    return out @ o


@pytest.mark.parametrize("mechanism", ["auto", "vanilla", "sdpa", "blockwise"])
def test_every_token_sees_every_other_but_no_padding(mechanism: str) -> None:
    attention = layer(mechanism)
    inputs = LayerInputs(rotary=None, mask=AttentionMask(key_valid=jnp.asarray(VALID)))
    got = jax.jit(lambda hidden: attention(hidden, inputs, None).hidden)(HIDDEN)
    np.testing.assert_allclose(got, naive(attention), atol=2e-5)  # float32 against float64


def test_there_is_nothing_to_cache() -> None:
    assert layer("auto").init_cache(2, 8, jnp.float32) is None
