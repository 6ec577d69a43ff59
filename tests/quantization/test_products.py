"""Products with quantized weights against float64, in both forms, and their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.native.codes import dequantize
from easydel.quantization import products
from easydel.quantization.formats import FORMATS, LARGEST, quantize
from easydel.quantization.products import choose, integer_product, quantized_product
from easydel.sharding import activation_mesh, create_mesh

SHAPES = [(1, 16, 6, 8), (4, 16, 6, 8), (9, 16, 6, 8), (2, 18, 5, 8), (2, 7, 3, 3), (3, 8, 4, 64)]
WIDE = SHAPES[3:4] + SHAPES[5:]  # a last group that is not full, as of 7 inputs, too; a group wider than the row


def cases(slow):
    """Return all formats and shapes; which of them are slow, `slow` says."""
    return [
        pytest.param(format, *shape, marks=pytest.mark.slow if slow(format, shape) else ())
        for format in FORMATS
        for shape in SHAPES
    ]


def data(rows, inputs, outputs):
    rng = np.random.default_rng(rows + inputs)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.normal(size=(outputs, inputs)).astype(np.float32))


def float64(codes, scales, format, size, inputs):
    back = dequantize(codes, scales, kind=format, group_size=size, inputs=inputs)
    return np.asarray(back, np.float64)


@pytest.mark.parametrize(
    ("format", "rows", "inputs", "outputs", "size"),
    cases(lambda format, shape: format == "nf4" and shape in WIDE),
)
def test_product_is_that_with_the_dequantized_weight(format, rows, inputs, outputs, size):
    x, weight = data(rows, inputs, outputs)
    codes, scales = quantize(weight, format, size)
    wanted = np.asarray(x, np.float64) @ float64(codes, scales, format, size, inputs).T

    def product(x):
        return quantized_product(x, codes, scales, format=format, group_size=size)

    @jax.jit
    def both(x):
        slopes = jnp.broadcast_to(jnp.arange(1.0, outputs + 1), (rows, outputs))
        out, pull = jax.vjp(product, x)
        return out, pull(slopes)[0]

    got, gradient = both(x)
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # sums of up to 18 numbers of size 1 in float32
    assert jax.eval_shape(product, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    slopes = np.arange(1.0, outputs + 1) @ float64(codes, scales, format, size, inputs)
    np.testing.assert_allclose(gradient, np.broadcast_to(slopes, gradient.shape), atol=1e-4)


def test_forms_by_shape():
    codes = jnp.zeros((6, 16), jnp.int8)
    assert choose(jnp.zeros((8, 16)), codes, 8) == "rows"
    assert choose(jnp.zeros((9, 16)), codes, 8) == "whole"
    assert choose(jnp.zeros((1, 16)), codes, 3) == "whole"
    assert choose(jnp.zeros((1, 1, 16)), codes, 8) == "whole"
    with activation_mesh(create_mesh((1, 8, 1, 1, 1))):
        assert choose(jnp.zeros((8, 16)), codes, 8) == "whole"


INTEGER = cases(lambda format, shape: format == "int8" and shape in (SHAPES[1], *WIDE))


@pytest.mark.parametrize(
    ("format", "rows", "inputs", "outputs", "size"), [case for case in INTEGER if case.values[0] != "nf4"]
)
def test_integer_product_is_the_formula(format, rows, inputs, outputs, size):
    x, weight = data(rows, inputs, outputs)
    x = x.at[0].set(0) if rows > 1 else x  # a token of zeros
    codes, scales = quantize(weight, format, size)
    largest = np.abs(np.asarray(x)).max(axis=1, keepdims=True) / np.float32(LARGEST[format])
    tokens = np.round(np.divide(x, largest, where=largest > 0, out=np.zeros_like(x))) * largest.astype(np.float64)
    wanted = tokens @ float64(codes, scales, format, size, inputs).T
    got = integer_product(x, codes, scales, format=format, group_size=size)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_integer_product_in_blocks_of_rows_is_the_same(monkeypatch):
    x, weight = data(9, 16, 6)
    codes, scales = quantize(weight, "int8", 8)
    whole = integer_product(x, codes, scales, format="int8", group_size=8)
    monkeypatch.setattr(products, "LARGEST_PARTS", 2 * scales.size)
    text = str(jax.make_jaxpr(lambda x: integer_product(x, codes, scales, format="int8", group_size=8))(x))
    assert "scan" in text
    parts = integer_product(x, codes, scales, format="int8", group_size=8)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)  # float32 sums over two groups


def test_integer_product_passes_gradients_straight_through():
    x, weight = data(3, 16, 6)
    codes, scales = quantize(weight, "int8", 8)
    gradient = jax.grad(lambda x: integer_product(x, codes, scales, format="int8", group_size=8).sum())(x)
    wanted = float64(codes, scales, "int8", 8, 16).sum(axis=0)
    np.testing.assert_allclose(gradient, np.broadcast_to(wanted, gradient.shape), atol=1e-5)


@pytest.mark.parametrize(("rows", "sums"), [(9, "preferred_element_type=int32"), (2, "i8[2,16]")])
def test_integer_product_sums_integers(rows, sums):
    """Many rows by a product into int32; few by the kernel, which takes the activations' codes (tests/native)."""
    text = str(
        jax.make_jaxpr(lambda *a: integer_product(*a, format="int8", group_size=8))(
            jnp.zeros((rows, 16)), jnp.zeros((4, 16), jnp.int8), jnp.zeros((4, 2))
        )
    )
    assert sums in text
