"""Attention to an encoder's states against a float64 reference, with and without its cache; and encoders' own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel.caching import CrossAttentionCache
from easydel.layers import Attention, AttentionMask, CrossAttention, LayerInputs

RNG = np.random.default_rng(0)
OPTIONS: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None, "init_stddev": 0.5}


def layer(cls: type = CrossAttention, **options: Any) -> Any:
    return cls(8, 4, 2, 6, rngs=nnx.Rngs(0), **OPTIONS, **options)


def reference(cross: Any, hidden: np.ndarray, source: np.ndarray, valid: np.ndarray) -> np.ndarray:
    kernels = [np.asarray(getattr(cross, f"{n}_proj").kernel.get_value(), np.float64) for n in "qkvo"]
    out = np.zeros((*hidden.shape[:2], 24))
    for b, h in np.ndindex(hidden.shape[0], 4):
        own, shared = slice(6 * h, 6 * h + 6), slice(6 * (h // 2), 6 * (h // 2) + 6)
        query, key, value = hidden[b] @ kernels[0][:, own], *(source[b] @ k[:, shared] for k in kernels[1:3])
        powers = np.exp(query @ key.T / np.sqrt(6)) * valid[b]
        out[b, :, own] = powers / powers.sum(axis=-1, keepdims=True) @ value
    return out @ kernels[3]


@pytest.mark.parametrize("mechanism", ["vanilla", "sdpa", "blockwise", "auto"])
def test_equals_the_reference_and_is_computed_once(mechanism: str) -> None:
    cross = layer(mechanism=mechanism, block_size=2)
    hidden, source = (RNG.normal(size=(2, n, 8)).astype(np.float32) for n in (5, 7))
    valid = np.ones((2, 7), bool)
    valid[1, :3] = False
    inputs = LayerInputs(rotary=None, mask=AttentionMask(), encoded=jnp.asarray(source), encoded_valid=valid)
    want = reference(cross, hidden, source, valid)
    np.testing.assert_allclose(cross(hidden, inputs, None).hidden, want, atol=2e-5)

    first = cross(hidden[:, :2], inputs, cross.init_cache(2, 5, jnp.float32))
    alone = inputs.replace(encoded=None, encoded_valid=None)  # from here on the cache has them
    second = cross(hidden[:, 2:], alone, first.cache.grow(9))
    np.testing.assert_allclose(np.concatenate([first.hidden, second.hidden], axis=1), want, atol=2e-5)
    assert second.cache.key is first.cache.key


def test_without_states_or_cache_it_raises() -> None:
    for cache in (None, CrossAttentionCache()):
        with pytest.raises(ValueError, match="neither the encoder's states nor a cache"):
            layer()(np.zeros((1, 2, 8), np.float32), LayerInputs(rotary=None, mask=AttentionMask()), cache)


def test_attention_that_is_not_causal_sees_everything_and_keeps_nothing() -> None:
    both, hidden = layer(Attention, causal=False), RNG.normal(size=(1, 5, 8)).astype(np.float32)
    assert both.init_cache(1, 8, jnp.float32) is None
    got = both(hidden, LayerInputs(rotary=None, mask=AttentionMask()), None).hidden
    np.testing.assert_allclose(got, reference(both, hidden, hidden, np.ones((1, 5), bool)), atol=2e-5)


def test_projections_can_have_deviations_of_their_own() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    options = OPTIONS | {"init_stddev": {name: 0.1 * (place + 1) for place, name in enumerate(names)}}
    made = Attention(64, 4, 4, 16, rngs=nnx.Rngs(0), **options)
    for name, deviation in options["init_stddev"].items():
        assert abs(float(getattr(made, name).kernel.get_value().std()) / deviation - 1) < 0.05
