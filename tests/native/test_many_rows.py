"""The kernel for many rows, on a matrix unit where there is one: its numbers, its derivatives, where it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import native
from easydel.layers import Linear
from easydel.native import library

RNG = np.random.default_rng(0)
TOLERANCE = 2e-6  # of the sum of the terms' magnitudes: some roundings of float32, as partial sums are added up
pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def errors(x: np.ndarray, kernel: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Return errors relative to the sum of the terms' magnitudes, against float64."""
    want = x.astype(np.float64) @ kernel.astype(np.float64)
    return np.abs(got - want) / (np.abs(x).astype(np.float64) @ np.abs(kernel).astype(np.float64))


@pytest.mark.parametrize(
    ("rows", "shape"), [(64, (128, 512)), (33, (7, 9)), (49, (33, 17)), (417, (129, 1031)), (80, (300, 1))], ids=str
)
def test_equals_the_product_in_float64(rows, shape):
    x, kernel = normal(rows, shape[0]), normal(*shape)
    assert errors(x, kernel, jax.jit(native.many_rows)(x, kernel)).max() <= TOLERANCE


@pytest.mark.parametrize("spread", [0, 6], ids=["of one size", "of many sizes"])
def test_is_as_precise_as_float32(spread):
    x, kernel = (normal(*shape) * np.exp(spread * normal(*shape)) for shape in ((96, 512), (512, 200)))
    ours, theirs = (errors(x, kernel, got) for got in (native.many_rows(x, kernel), x @ kernel))
    assert np.sqrt(np.mean(ours**2)) <= 1.5 * np.sqrt(np.mean(theirs**2))  # numpy's sums differ in their order alone


def test_what_is_not_finite_stays_so_in_its_row_and_column():
    x, kernel = normal(50, 40), normal(40, 60)
    x[3, 5], kernel[7, 11] = np.inf, np.nan
    lost = np.zeros((50, 60), bool)
    lost[3], lost[:, 11] = True, True
    np.testing.assert_array_equal(np.isfinite(native.many_rows(x, kernel)), ~lost)


def test_a_kernel_of_a_stack_is_read_where_it_lies():
    x, stack = normal(50, 64), jnp.asarray(normal(3, 64, 70))

    def each(x, stack):
        def step(_, place):
            kernel = jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)
            with native.kernels_are_sliced([native.Slice(kernel, stack, place)]):
                return None, native.many_rows(x, kernel)

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    assert "f32[64,70]" not in jax.jit(each).lower(x, stack).compile().as_text()  # no layer's matrix is made
    np.testing.assert_allclose(jax.jit(each)(x, stack), x @ stack, atol=1e-5)
    want = jax.jit(jax.grad(lambda x, stack: (x @ stack).sum(), (0, 1)))(x, stack)
    for got, wanted in zip(jax.grad(lambda *args: each(*args).sum(), (0, 1))(x, stack), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_derivatives_are_those_of_the_product():
    x, kernel, cotangent = normal(50, 40), normal(40, 60), normal(50, 60)
    got, pull = jax.vjp(native.many_rows, x, kernel)
    want, pull_plain = jax.vjp(jnp.matmul, x, kernel)
    for got_one, other in zip((got, *pull(cotangent)), (want, *pull_plain(cotangent)), strict=True):
        np.testing.assert_allclose(got_one, other, rtol=1e-5, atol=1e-4)
    _, pushed = jax.jvp(native.many_rows, (x, kernel), (x, kernel))
    np.testing.assert_allclose(pushed, 2 * want, rtol=1e-5, atol=1e-4)
    together = jax.vmap(native.many_rows, in_axes=(0, None))(np.stack([x, 2 * x]), kernel)
    np.testing.assert_allclose(together[1], 2 * want, rtol=1e-5, atol=1e-4)


def test_a_linear_layer_takes_it_where_there_is_a_matrix_unit(monkeypatch):
    linear = Linear(256, 512, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(2, 30, 256))
    for has in (True, False):
        monkeypatch.setattr(library, "has_matrix_unit", lambda has=has: has)
        assert ("easydel_grouped" in jax.jit(lambda x: linear(x)).lower(x).as_text()) is has
        want = np.asarray(x, np.float64) @ np.asarray(linear.kernel.get_value(), np.float64)
        np.testing.assert_allclose(linear(x), want, atol=1e-5)
    monkeypatch.setattr(library, "has_matrix_unit", lambda: True)
    for few in (x[:, :16], x[..., :8].astype(jnp.bfloat16)):
        layer = Linear(few.shape[-1], 512, rngs=nnx.Rngs(0), dtype=few.dtype)
        assert "easydel_grouped" not in jax.jit(layer).lower(few).as_text()


@pytest.mark.skipif(not library.has_matrix_unit(), reason="there is no matrix unit: the other tests were without one")
def test_kernels_are_right_without_the_unit_too():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_grouped.py"]
    environment = os.environ | {"EASYDEL_MATRIX_UNIT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
