"""Quantized products: kernels and XLA forms against float64 and integer formulas of numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import native
from easydel.native import library, quantized
from easydel.native.codes import KINDS

RNG = np.random.default_rng(0)
needs_kernels = pytest.mark.skipif(not library.serves_quantized(), reason="no C++ kernels, or no AVX2")
# Of the sum of the terms' sizes: float32 rounds each to 6e-8, and the longest chain of additions here is of some ten.
TOLERANCE = 1e-6
# XLA's own product sums in an order of its own, by processor: the root of 1,000 terms times half a unit of 1.2e-7.
BY_XLA = 2e-6
# inputs, outputs, group size: whole units, shorter last groups, odd inputs, one group of everything, one output.
SHAPES = [
    (256, 64, 64),
    (576, 130, 64),
    (200, 37, 32),
    (1000, 7, 128),
    (77, 9, 16),
    (333, 5, 48),
    (45, 3, 64),
    (130, 1, 16),
]
# What the narrower kernels are tested with beyond a few shapes is slow.
EVERY = [(shape, True) for shape in SHAPES] + [(shape, False) for shape in (SHAPES[1], SHAPES[4], SHAPES[7])]
EVERY += [pytest.param(shape, False, marks=pytest.mark.slow) for shape in SHAPES if (shape, False) not in EVERY]
POINTS = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
POINTS += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def weights(kind: str, inputs: int, outputs: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales, integer codes `[out, in]` (or NF4's points) and float64 weights, by numpy alone."""
    scales = (RNG.random((outputs, -(-inputs // group))) / 7).astype(np.float32)
    scales[1:2] = 0  # an output of nothing but zeros, where there are several
    scales[-1, -1] *= 1e4  # an outlier
    if kind == "int8":
        codes = RNG.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        codes[:, :5] = [-128, 127, -127, 0, 1]
        plain = codes.astype(np.float64)
    else:
        nibbles = RNG.integers(0, 16, (outputs, inputs + inputs % 2))
        nibbles[:, :4] = [8, 7, 15, 0]
        nibbles[:, inputs:] = 7
        codes = (nibbles[:, ::2] * 16 + nibbles[:, 1::2]).astype(np.uint8)
        nibbles = nibbles[:, :inputs]
        plain = np.float32(POINTS).astype(np.float64)[nibbles] if kind == "nf4" else np.float64((nibbles + 8) % 16 - 8)
    return codes, scales, plain, plain * np.repeat(scales.astype(np.float64), group, axis=1)[:, :inputs]


def inputs_of(rows: int, width: int) -> np.ndarray:
    x = RNG.standard_normal((rows, width)).astype(np.float32)
    x[:, 3], x[:, 7] = 300.0, 0.0
    x[:, 11] = 1e-40  # denormal: counts for nothing, here and in XLA
    return x


def assert_close(got, x, want_weights, tolerance: float = TOLERANCE) -> None:
    x = x.astype(np.float64)
    bound = tolerance * (np.abs(x) @ np.abs(want_weights).T)
    assert np.all(np.abs(np.asarray(got, np.float64) - x @ want_weights.T) <= bound)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "widest"), EVERY, ids=lambda x: {True: "widest", False: "avx2"}.get(x, str(x)))
def test_kernels_equal_the_product_in_float64(kind, shape, widest):
    codes, scales, _, want = weights(kind, *shape)
    for rows in (1, 2, 3, 4, 5, 8):
        x = inputs_of(rows, shape[0])
        assert_close(
            quantized.call_floats(x, codes[None], scales[None], 0, np.int32([rows]), kind, shape[2], widest), x, want
        )


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("shape", "widest"), EVERY, ids=lambda x: {True: "widest", False: "avx2"}.get(x, str(x)))
def test_integer_kernels_are_exact(kind, shape, widest):
    """With scales of powers of two, sums below 2^24 of them are exact in float32 as well: not one bit may differ."""
    codes, _, plain, _ = weights(kind, *shape)
    scales = np.exp2(RNG.integers(-1, 1, (shape[1], -(-shape[0] // shape[2])))).astype(np.float32)
    spread = np.repeat(scales, shape[2], axis=1)[:, : shape[0]]
    for rows in (1, 3, 4, 6, 8):
        x = RNG.integers(-128, 128, (rows, shape[0])).astype(np.int8)
        x[0], x[-1, ::2] = -128, 127
        want = x.astype(np.int64) @ (plain * spread * 2).astype(np.int64).T
        keep = np.abs(want) < 2**24
        got = np.asarray(quantized.call_integers(x, codes[None], scales[None], 0, np.int32([rows]), shape[2], widest))
        assert keep.mean() > 0.7
        np.testing.assert_array_equal(got[keep], (want / 2)[keep])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(130, 37, 64), (50, 6, 7), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((77, 9, 16), (50, 6, 10)))],
    ids=str,
)
def test_without_kernels_results_are_the_same(kind, shape, monkeypatch):
    codes, scales, _, want = weights(kind, *shape)
    options = {"kind": kind, "group_size": shape[2]}
    whole = RNG.integers(-128, 128, (3, shape[0])).astype(np.int8)
    x = inputs_of(3, shape[0])
    with_kernels = native.quantized_rows(x, codes, scales, **options)
    monkeypatch.setenv("EASYDEL_NATIVE", "0")
    library.is_available.cache_clear()
    try:
        assert not native.serves_quantized_rows(x, codes, scales, **options)
        without = jax.jit(functools.partial(native.quantized_rows, **options))(x, codes, scales)
        integers = None if kind == "nf4" else native.integer_rows(whole, codes, scales, **options)
    finally:
        library.is_available.cache_clear()
    assert_close(without, x, want)
    assert_close(with_kernels, x, want)
    if integers is not None:
        assert_close(integers, whole, want)
        assert_close(native.integer_rows(whole, codes, scales, **options), whole, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(130, 37, 64), (77, 9, 16), (50, 6, 7)], ids=str)
def test_dequantized_weights_are_codes_times_scales(kind, shape, monkeypatch):
    codes, scales, plain, _ = weights(kind, *shape)
    spread = np.repeat(scales, shape[2], axis=1)[:, : shape[0]]
    options = {"kind": kind, "group_size": shape[2], "inputs": shape[0]}
    want = plain.astype(np.float32) * spread  # one rounding, the same everywhere
    np.testing.assert_array_equal(native.dequantized(codes, scales, **options), want)
    monkeypatch.setattr(library, "is_available", lambda: False)
    np.testing.assert_array_equal(native.dequantized(codes, scales, **options), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(130, 37, 64), (77, 9, 16), (300, 270, 64), (50, 6, 7)], ids=str)
@pytest.mark.parametrize("native_too", [True, False], ids=["native", "xla"])
def test_many_rows(kind, shape, native_too, monkeypatch):
    if not native_too:
        monkeypatch.setattr(library, "is_available", lambda: False)
    codes, scales, _, want = weights(kind, *shape)
    options = {"kind": kind, "group_size": shape[2]}
    x = inputs_of(20, shape[0])
    assert_close(native.quantized_rows(x, codes, scales, **options), x, want, BY_XLA)
    if kind != "nf4":
        whole = RNG.integers(-128, 128, (20, shape[0])).astype(np.int8)
        assert_close(native.integer_rows(whole, codes, scales, **options), whole, want, BY_XLA)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_outputs(kind):
    codes, scales, _, _ = weights(kind, 77, 9, 16)
    product = functools.partial(native.quantized_rows, kind=kind, group_size=16)
    assert product(np.ones((0, 77), np.float32), codes, scales).shape == (0, 9)
    assert product(np.ones((2, 77), np.float32), codes[:0], scales[:0]).shape == (2, 0)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_depends_on_neither_its_company_nor_the_threads(kind):
    """Threads take blocks of outputs: some of them alone, as some rows alone, give the same bits."""
    codes, scales, _, _ = weights(kind, 576, 300, 64)
    x = inputs_of(8, 576)
    rows = functools.partial(native.quantized_rows, kind=kind, group_size=64)
    together = np.asarray(rows(x, codes, scales))
    for r in range(8):
        np.testing.assert_array_equal(rows(x[r : r + 1], codes, scales)[0], together[r])
    np.testing.assert_array_equal(rows(x[2:5], codes[101:240], scales[101:240]), together[2:5, 101:240])


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_float_product(kind):
    codes, scales, plain, _ = weights(kind, 130, 37, 32)
    scales[:] = 0.1
    x, cotangent = inputs_of(2, 130), RNG.standard_normal((2, 37)).astype(np.float32)

    def ours(x, scales):
        return native.quantized_rows(x, codes, scales, kind=kind, group_size=32)

    def plainly(x, scales):
        spread = jnp.repeat(scales, 32, axis=1)[:, :130]
        return jnp.matmul(x, (jnp.float32(plain) * spread).T, precision="highest")

    got, want = jax.vjp(ours, x, scales)[1](cotangent), jax.vjp(plainly, x, scales)[1](cotangent)
    for one, other in zip(got, want, strict=True):  # of sums as long as the product's
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    pushed = jax.jvp(lambda x: ours(x, scales), (x,), (x,))[1]
    np.testing.assert_allclose(pushed, plainly(x, scales), rtol=1e-5, atol=1e-5 * np.abs(pushed).max())
    mapped = jax.vmap(lambda row: ours(row[None], scales)[0])(x)
    np.testing.assert_array_equal(mapped, ours(x, scales))


@needs_kernels
def test_where_the_kernel_is_chosen():
    codes, scales, _, want = weights("int8", 128, 16, 32)
    options = {"kind": "int8", "group_size": 32}

    def text(rows: int, dtype=jnp.float32) -> str:
        function = jax.jit(functools.partial(native.quantized_rows, **options))
        return function.lower(jnp.ones((rows, 128), dtype), codes, scales).as_text()

    assert "easydel_quantized_rows" in text(8)
    assert "easydel_quantized_rows" in text(1, jnp.bfloat16)
    assert "easydel_quantized_rows" not in text(9)
    x = jnp.asarray(inputs_of(2, 128), jnp.bfloat16)
    half = native.quantized_rows(x, codes, scales, **options)
    assert half.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ want.T
    # One rounding to 8 bits of mantissa, after those of the sum.
    bound = 2.0**-8 * np.abs(exact) + TOLERANCE * (np.abs(np.asarray(x, np.float64)) @ np.abs(want).T)
    assert np.all(np.abs(np.asarray(half, np.float64) - exact) <= bound)
    odd = weights("int8", 100, 4, 20)
    assert not native.serves_quantized_rows(jnp.ones((1, 100)), *odd[:2], kind="int8", group_size=20)
    assert native.serves_quantized_rows(jnp.ones((1, 100)), odd[0], odd[1][:, :1], kind="int8", group_size=100)


def test_arrays_that_do_not_belong_together_are_refused():
    codes, scales, _, _ = weights("int8", 64, 4, 32)
    x = np.ones((1, 64), np.float32)
    for change, words in (
        ({"kind": "fp4"}, "int8, int4, nf4"),
        ({"kind": "nf4"}, r"expected uint8 \(4, 32\)"),
        ({"group_size": 16}, r"expected float32 \(4, 4\)"),
        ({"group_size": 0}, "at least one"),
        ({"x": x[:, :60]}, r"expected int8 \(4, 60\)"),
        ({"x": x[0]}, r"expected \[rows, in\]"),
        ({"x": x.astype(np.int8)}, "integer_rows"),
        ({"scales": scales.astype(np.float16)}, "float16"),
    ):
        given = {"x": x, "codes": codes, "scales": scales, "kind": "int8", "group_size": 32} | change
        with pytest.raises(ValueError, match=words):
            native.quantized_rows(**given)
    with pytest.raises(ValueError, match="expected int8 inputs"):
        native.integer_rows(x, codes, scales, kind="int8", group_size=32)
