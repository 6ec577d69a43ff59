"""Quantized experts: products against float64 formulas in every form, gradients, and that only codes are read."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import UnsupportedError
from easydel.layers import SparseMoE
from easydel.layers.moe.experts import ExpertLinear
from easydel.native import library
from easydel.quantization import apply, expert_products
from easydel.quantization.formats import LARGEST
from easydel.quantization.linear import quantized_layer
from easydel.sharding import activation_mesh, create_mesh
from tests.quantization.tiny import METHODS

EXPERTS, INPUTS, OUTPUTS, SIZE = 4, 40, 12, 16
SIZES = np.int32([3, 0, 5, 1])
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
OPTIONS = {"mechanism": "auto", "precision": None}


def quantized(method: str):
    """Return a quantized layer; that of a8bit with factors that are not 1."""
    layer = ExpertLinear((EXPERTS, INPUTS, OUTPUTS), init_stddev=1.0, rngs=nnx.Rngs(0), **DTYPES)
    made = quantized_layer(layer, method, SIZE)
    factor = jnp.exp(jax.random.normal(jax.random.key(1), (EXPERTS, INPUTS))) if method == "a8bit" else None
    apply.fill_layer(made, layer.kernel.get_value(), factor)
    return made


def rows_of(count: int) -> np.ndarray:
    x = np.random.default_rng(count).normal(size=(count, INPUTS)).astype(np.float32)
    x[0] = 0  # a token of zeros
    return x


def rounded(x: np.ndarray, layer) -> np.ndarray:
    """Return what the layer takes activations for, float64."""
    if not layer.how.quantizes_activations:
        return x.astype(np.float64)
    largest = np.abs(x).max(axis=1, keepdims=True) / np.float32(LARGEST[layer.format])
    return np.round(np.divide(x, largest, where=largest > 0, out=np.zeros_like(x))) * largest.astype(np.float64)


# Factors of inputs change nothing about the codes of 8bit.
SLOW = {("8bit", "auto"), *((method, "blocks") for method in ("8bit", "a8bit", "a4q"))}
SLOW |= {(method, "without kernels") for method in ("8bit", "a8bit", "a8q")}


@pytest.mark.parametrize(
    ("method", "mechanism"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
        for case in itertools.product(METHODS, ["auto", "blocks", "without kernels", "ragged"])
    ],
)
def test_product_is_the_formula_and_gradients_pass_straight_through(method, mechanism, monkeypatch):
    layer = quantized(method)
    if mechanism == "without kernels":
        monkeypatch.setattr(library, "is_available", lambda: False)
        mechanism = "auto"
    options = {"mechanism": mechanism, "precision": jax.lax.Precision.HIGHEST}
    if mechanism == "ragged" and layer.how.quantizes_activations:
        with pytest.raises(UnsupportedError, match=f"'ragged' multiplies floats.*{method}.*'auto' or 'blocks'"):
            layer.product(jnp.asarray(rows_of(9)), SIZES, **options)
        return
    slopes, kernels = np.arange(1.0, OUTPUTS + 1), np.asarray(layer.dequantized(), np.float64)
    for sizes in (SIZES, np.int32([0, 1, 0, 1])):
        x = rows_of(int(sizes.sum()))

        @jax.jit
        def both(x, sizes):
            out, pull = jax.vjp(lambda x: layer.product(x, sizes, **options), x)
            return out, pull(jnp.broadcast_to(jnp.float32(slopes), out.shape))[0]

        out, gradient = both(x, sizes)
        of_rows = kernels[np.repeat(range(EXPERTS), sizes)]
        # Sums of 40 terms of up to 10 in float32, and of 12 of up to 40
        np.testing.assert_allclose(out, np.einsum("ri,rio->ro", rounded(x, layer), of_rows), atol=2e-5)
        np.testing.assert_allclose(gradient, of_rows @ slopes, atol=2e-4)


def test_forms_by_shape_and_platform(monkeypatch):
    layer = quantized("nf4")
    codes, scales = layer.codes.get_value(), layer.scales.get_value()

    def form(rows, integers=False, in_blocks=False):
        how = expert_products.Product("int4" if integers else "nf4", SIZE, integers, in_blocks)
        return expert_products.choose(jnp.zeros((rows, INPUTS)), codes, scales, jnp.asarray(SIZES), how)

    kernel = "groups" if library.serves_quantized() else "blocks"
    assert form(2) == form(64) == form(65, integers=True) == kernel
    assert form(65) == form(2, in_blocks=True) == "blocks"
    monkeypatch.setattr(library, "is_available", lambda: False)
    assert form(2) == "blocks"


@pytest.mark.skipif(not library.serves_quantized(), reason="no C++ kernels, or no AVX2")
@pytest.mark.parametrize("method", ["nf4", "8bit", "a8q", "a4q"])
def test_a_token_meets_codes_only(method):
    """No array of floats as large as one expert's kernel is in the compiled program."""
    layer = quantized(method)
    text = jax.jit(lambda x: layer.product(x, jnp.int32([0, 1, 0, 1]), **OPTIONS)).lower(rows_of(2)).compile().as_text()
    assert "easydel_integer_rows" in text or "easydel_quantized_rows" in text
    assert f"f32[{INPUTS},{OUTPUTS}]" not in text
    assert f"f32[{OUTPUTS},{INPUTS}]" not in text


def test_parts_add_up_where_no_group_is_cut():
    layer = ExpertLinear((2, 96, 8), init_stddev=1.0, rngs=nnx.Rngs(0), **DTYPES)
    for method, size, parts, adds_up in (
        ("nf4", 16, 2, True), ("nf4", 32, 2, False), ("8bit", 32, 3, True), ("nf4", 3, 32, False),
        ("8bit", 3, 32, True), ("a8q", 16, 2, False), ("a8q", 16, 1, True), ("8bit", 16, 5, False),
    ):  # fmt: skip
        assert quantized_layer(layer, method, size).adds_up(parts) is adds_up, (method, size, parts)


@pytest.mark.parametrize("method", ["nf4", "a8q"])
def test_a_layer_on_a_mesh_gives_what_one_device_gives(method):
    """With groups that fit the parts (nf4) the width is split; a token's scale (a8q) needs the whole width."""
    moe = SparseMoE(32, 64, 4, top_k=2, act="silu", init_stddev=0.3, precision=None, rngs=nnx.Rngs(0), **DTYPES)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(moe.experts, name)
        made = quantized_layer(layer, method, 16)
        apply.fill_layer(made, layer.kernel.get_value())
        setattr(moe.experts, name, made)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
    alone = jax.jit(moe.__call__)(x)[0]
    mesh = create_mesh((1, 2, 2, 2, 1))

    def run(x):
        with activation_mesh(mesh):
            return moe(x)[0]

    text = jax.jit(run).lower(x).as_text()
    assert ("tensor<2x64x32xi8>" if method == "a8q" else "tensor<2x32x16xui8>") in text  # of two of four experts
    np.testing.assert_allclose(jax.jit(run)(x), alone, atol=1e-5)  # partial sums
