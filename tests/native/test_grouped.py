"""The grouped product: its numbers and gradients against float64 loops, at the edges of its blocks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from easydel import native

RNG = np.random.default_rng(0)
TOLERANCE = 2e-6  # of the sum of the terms' magnitudes: some roundings of float32, as partial sums are added up
pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def loop(x: np.ndarray, kernels: np.ndarray, sizes: list[int]) -> np.ndarray:
    out, first = np.zeros((len(x), kernels.shape[2])), 0
    for kernel, size in zip(kernels, sizes, strict=True):
        out[first : first + size] = x[first : first + size].astype(np.float64) @ kernel
        first += size
    return out


def outer(x: np.ndarray, y: np.ndarray, sizes: list[int]) -> np.ndarray:
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return np.stack([x[part].T.astype(np.float64) @ y[part] for part in parts])


@pytest.mark.parametrize(
    ("sizes", "rows", "features"),
    [
        ([3, 0, 5], 8, (7, 9)),  # smaller than any tile
        ([1, 4, 5, 0, 13], 30, (40, 300)),  # few rows, many rows, rows of nobody
        ([400, 12], 412, (257, 33)),  # a group taller than a block, one step deeper than a pass
        ([0, 0], 4, (5, 6)),
        ([24], 24, (513, 544)),  # whole tiles in several blocks of columns
        ([70, 0, 131], 201, (130, 1100)),  # more rows than are few, and a last block narrower than others
    ],
    ids=str,
)
def test_equals_the_loop_in_float64(sizes, rows, features):
    x, kernels, cotangent = normal(rows, features[0]), normal(len(sizes), *features), normal(rows, features[1])
    counts = np.asarray(sizes, np.int32)
    got, pull = jax.vjp(lambda x, kernels: native.grouped(x, kernels, counts), x, kernels)
    d_x, d_kernels = pull(cotangent)
    turned = kernels.transpose(0, 2, 1)
    for found, want, scale in (
        (got, loop(x, kernels, sizes), loop(abs(x), abs(kernels), sizes)),
        (d_x, loop(cotangent, turned, sizes), loop(abs(cotangent), abs(turned), sizes)),
        (d_kernels, outer(x, cotangent, sizes), outer(abs(x), abs(cotangent), sizes)),
    ):
        assert found.shape == want.shape
        assert np.all(np.abs(found - want) <= TOLERANCE * scale)  # exactly 0 where nothing is summed


def test_sizes_that_cannot_be_read_nothing_they_should_not():
    x, kernels = normal(6, 8), normal(2, 8, 5)
    want = loop(x, kernels, [0, 6])
    np.testing.assert_allclose(native.grouped(x, kernels, np.asarray([-3, 99], np.int32)), want, atol=1e-5)


def test_a_slice_is_read_from_its_stack():
    x, stack, sizes = normal(5, 8), normal(3, 2, 8, 6), np.asarray([2, 3], np.int32)

    def layer(x, stack, place):
        kernels = stack[place]
        with native.kernels_are_sliced([native.Slice(kernels, stack, place)]):
            return native.grouped(x, kernels, sizes)

    compiled = jax.jit(lambda x, stack: jax.lax.map(lambda place: layer(x, stack, place), np.arange(3)))
    for got, kernels in zip(compiled(x, stack), stack, strict=True):
        np.testing.assert_allclose(got, loop(x, kernels, [2, 3]), atol=1e-5)
    text = compiled.lower(x, stack).compile().as_text()
    assert "= f32[2,8,6]" not in text
    assert "= f32[1,2,8,6]" not in text, "the slice was copied"
    d_stack = jax.grad(lambda stack: layer(x, stack, 1).sum())(stack)
    np.testing.assert_allclose(d_stack[1], outer(x, np.ones((5, 6), np.float32), [2, 3]), atol=1e-5)
    assert not np.asarray(d_stack)[[0, 2]].any()
