"""The number formats against numpy, value by value, and their stated error bounds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easydel.native.codes import dequantize, unpack
from easydel.quantization.formats import FORMATS, LARGEST, code_shape, pack, quantize, quantize_kernel
from tests.quantization.tiny import LIMITS, POINTS, groups_of, reference_nf4

# Of the largest magnitude in a group: half the widest gap between points, half a step of integers.
BOUND = {"nf4": (POINTS[1] - POINTS[0]) / 2, "int8": 1 / 254, "int4": 1 / 14}
SHAPES = [(2, 8, 4), (3, 10, 4), (1, 7, 3), (2, 5, 8), (4, 64, 64), (1, 1, 1)]  # out, in, group size
KINDS = ("normal", "zeros", "outlier", "tiny", "borders")


@functools.cache
def compiled(format: str, size: int):
    return jax.jit(functools.partial(quantize, format=format, group_size=size))


def weight_of(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape).astype(np.float32)
    if kind == "zeros":
        weight[0] = 0
    elif kind == "outlier":
        weight[0, seed % shape[1]] = 1e6
    elif kind == "tiny":
        weight *= np.float32(1e-30)
    elif kind == "borders":  # exactly halfway, as float32 has it, and on the points themselves
        weight = rng.choice(np.concatenate([LIMITS, POINTS, [np.float32(1)]]), shape).astype(np.float32)
        weight[:, 0] = 1
    return weight


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(SHAPES), kind=st.sampled_from(KINDS), half=st.booleans(), seed=st.integers(0, 2**31))
def test_nf4_is_the_reference_bit_for_bit(shape, kind, half, seed):
    *weight_shape, size = shape
    weight = jnp.asarray(weight_of(kind, tuple(weight_shape), seed))
    weight = weight.astype(jnp.bfloat16) if half else weight
    codes, scales = compiled("nf4", size)(weight)
    wanted_codes, wanted_scales = reference_nf4(np.asarray(weight.astype(jnp.float32)), size)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(scales, wanted_scales)
    assert codes.dtype == jnp.uint8
    assert scales.dtype == jnp.float32


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_errors_stay_within_the_stated_bounds(format, shape, kind, half, seed):
    *weight_shape, size = shape
    weight = jnp.asarray(weight_of(kind, tuple(weight_shape), seed))
    weight = weight.astype(jnp.bfloat16) if half else weight
    codes, scales = compiled(format, size)(weight)
    assert codes.shape == code_shape(*weight_shape, format)
    back = np.asarray(dequantize(codes, scales, kind=format, group_size=size, inputs=weight_shape[1]))
    for row, got in zip(np.asarray(weight.astype(jnp.float32)), back, strict=True):
        for one, two in zip(groups_of(row, size), groups_of(got, size), strict=True):
            largest = float(np.abs(one).max())
            # 1e-6: three roundings in float32
            assert np.abs(one.astype(np.float64) - two).max() <= largest * (BOUND[format] + 1e-6)
            if largest == 0:
                np.testing.assert_array_equal(two, 0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integers_are_the_formula(format):
    weight = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    codes, scales = quantize(jnp.asarray(weight), format, 8)
    whole = np.asarray(codes if format == "int8" else unpack(codes, format, 20))
    for row, group in np.ndindex(6, 3):
        part = weight[row, 8 * group : 8 * group + 8].astype(np.float64)
        scale = np.abs(part).max() / LARGEST[format]
        np.testing.assert_allclose(scales[row, group], scale, rtol=2e-7)  # of float32
        np.testing.assert_array_equal(whole[row, 8 * group : 8 * group + 8], np.round(part / scale))


def test_codes_are_packed_high_nibble_first():
    codes = jnp.asarray([[1, 2, 3]], jnp.uint8)
    packed = pack(codes, "nf4")
    assert packed.tolist() == [[0x12, 0x37]]  # 7 is the code of 0
    assert unpack(packed, "nf4", 3).tolist() == codes.tolist()
    negative = jnp.asarray([[-1, 7, -7]], jnp.int8)
    assert pack(negative, "int4").tolist() == [[0xF7, 0x90]]
    assert unpack(pack(negative, "int4"), "int4", 3).tolist() == negative.tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_kernels_and_stacks_give_the_same_codes(format):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 6)).astype(np.float32))
    codes, scales = quantize_kernel(kernel, format, 4)
    for layer in range(3):
        one_codes, one_scales = quantize(kernel[layer].T, format, 4)
        np.testing.assert_array_equal(codes[layer], one_codes)
        np.testing.assert_array_equal(scales[layer], one_scales)
