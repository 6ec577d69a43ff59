"""Norm, MLP, embedding, linear layers and activations against float64 references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

import easydel
from easydel.layers import Embed, GatedMLP, Linear, OffsetLayerNorm, RMSNorm, activation, layer_norm
from easydel.layers.activations import ACTIVATIONS

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 8)).astype(np.float32)
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}


def f64(layer: Linear) -> tuple[np.ndarray, np.ndarray | float]:
    bias = 0.0 if layer.bias is None else np.asarray(layer.bias.get_value(), np.float64)
    return np.asarray(layer.kernel.get_value(), np.float64), bias


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm(epsilon: float, offset: float) -> None:
    norm = RMSNorm(8, epsilon=epsilon, offset=offset)
    fresh = X.astype(np.float64) / np.sqrt((X.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon)
    np.testing.assert_allclose(norm(X), fresh, atol=1e-6)
    scale = RNG.normal(size=8).astype(np.float32)
    norm.scale.set_value(jnp.asarray(scale))
    np.testing.assert_allclose(norm(X), fresh * (offset + scale), atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_layer_norm(shift: float) -> None:
    """A large mean takes digits from the numbers themselves, but no more than that."""
    x = X + np.float32(shift)
    wide = x.astype(np.float64)
    fresh = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-12)
    norm = layer_norm(8, 1e-12, dtype=jnp.float32, param_dtype=jnp.float32)
    np.testing.assert_allclose(norm(x), fresh, atol=1e-6 if shift == 0 else 1e-3)
    scale, bias = RNG.normal(size=(2, 8)).astype(np.float32)
    norm.scale.set_value(jnp.asarray(scale))
    norm.bias.set_value(jnp.asarray(bias))
    np.testing.assert_allclose(norm(x), fresh * scale + bias, atol=5e-6 if shift == 0 else 5e-3)


def test_layer_norm_stored_as_a_distance_from_one() -> None:
    wide = X.astype(np.float64) + 3
    fresh = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(OffsetLayerNorm(8, epsilon=0.5)(jnp.asarray(wide, jnp.float32)), fresh, atol=1e-6)
    norm = OffsetLayerNorm(8, epsilon=0.5, init_scale=2.0)
    np.testing.assert_array_equal(norm.scale.get_value(), 1.0)
    scale, bias = RNG.normal(size=(2, 8)).astype(np.float32)
    norm.scale.set_value(jnp.asarray(scale))
    norm.bias.set_value(jnp.asarray(bias))
    np.testing.assert_allclose(norm(jnp.asarray(wide, jnp.float32)), fresh * (1 + scale) + bias, atol=5e-6)


def test_rms_norm_takes_its_statistics_in_float32() -> None:
    norm = RMSNorm(8, epsilon=1e-6, dtype=jnp.float16)
    x = jnp.full((1, 8), 300.0, jnp.float16)  # squares overflow float16
    assert norm(x).dtype == jnp.float16
    np.testing.assert_allclose(norm(x), 1.0, atol=1e-3)


@pytest.mark.parametrize("use_bias", [False, True])
def test_gated_mlp(use_bias: bool) -> None:
    mlp = GatedMLP(8, 12, act="silu", use_bias=use_bias, init_stddev=0.5, rngs=nnx.Rngs(0), **DTYPES)
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        assert (layer.bias is not None) == use_bias
        if use_bias:
            layer.bias.set_value(jnp.asarray(RNG.normal(size=layer.bias.get_value().shape), jnp.float32))
    (gate, gate_bias), (up, up_bias), (down, down_bias) = map(f64, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gated = X @ gate + gate_bias
    want = (gated / (1 + np.exp(-gated)) * (X @ up + up_bias)) @ down + down_bias
    np.testing.assert_allclose(mlp(X), want, atol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (2, 3, 4, 8), (0, 5, 8)])
def test_linear(shape: tuple[int, ...]) -> None:
    layer = Linear(8, 6, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(6.0))
    x = RNG.normal(size=shape).astype(np.float32)
    kernel, bias = f64(layer)
    got = layer(x)
    assert got.shape == (*shape[:-1], 6)
    np.testing.assert_allclose(got, x @ kernel + bias, atol=1e-5)


def test_embedding() -> None:
    embed = Embed(10, 4, rngs=nnx.Rngs(0))
    table = np.asarray(embed.embedding.get_value())
    np.testing.assert_array_equal(embed(jnp.array([[3, 0], [9, 3]])), table[[[3, 0], [9, 3]]])
    outside = np.asarray(embed(jnp.array([[-1, 10, 5, 2**30]])))[0]
    assert np.isnan(outside[[0, 1, 3]]).all()
    assert np.isfinite(outside[2]).all()
    with pytest.raises(ValueError, match="integers"):
        embed(jnp.array([[1.0]]))
    hidden = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(embed.attend(jnp.asarray(hidden)), hidden @ table.T, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_transformers_own(name: str) -> None:
    x = np.linspace(-8, 8, 161, dtype=np.float32)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), want, atol=2e-6, rtol=2e-6)


def test_every_activation_of_transformers_without_weights_is_known() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}


def test_activations_have_finite_slopes_everywhere() -> None:
    x = jnp.asarray([-1e4, -100.0, 0.0, 100.0, 1e4])
    slopes = jax.jit(lambda x: {name: jax.vmap(jax.grad(act))(x) for name, act in ACTIVATIONS.items()})(x)
    for name, slope in slopes.items():
        assert np.isfinite(slope).all(), name


def test_an_unknown_activation_raises() -> None:
    with pytest.raises(easydel.UnsupportedError, match=r"'nope' is not supported.*silu"):
        activation("nope")
