"""The kernel for a few rows and a table: its numbers, its derivatives, and where it is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import native
from easydel.layers import Embed

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
# One rounding of float32 for each of the additions that follow one another: a lane's share of the depth, and the lanes.
TOLERANCE = 1e-5


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def calls_kernel(function, *args) -> bool:
    return "easydel_few_dots" in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("shape", [(49_152, 64), (1537, 577), (70_003, 1), (5, 20_001), (3, 8)], ids=str)
def test_equals_the_product_in_float64(rows, shape):
    x, table = normal(rows, shape[1]), normal(*shape)
    want = x.astype(np.float64) @ table.astype(np.float64).T
    scale = np.abs(x) @ np.abs(table).T  # of the terms that are summed
    assert np.all(np.abs(jax.jit(native.few_dots)(x, table) - want) <= TOLERANCE * scale)


def test_a_row_does_not_depend_on_its_company():
    x, table = normal(4, 65), normal(301, 65)
    together = native.few_dots(x, table)
    for row in range(4):
        np.testing.assert_array_equal(native.few_dots(x[row : row + 1], table)[0], together[row])


def test_derivatives_are_those_of_the_product():
    x, table, cotangent = normal(2, 65), normal(301, 65), normal(2, 301)
    got, pull = jax.vjp(native.few_dots, x, table)
    want, pull_plain = jax.vjp(lambda x, table: x @ table.T, x, table)
    for got_one, other in zip((got, *pull(cotangent)), (want, *pull_plain(cotangent)), strict=True):
        np.testing.assert_allclose(got_one, other, rtol=1e-5, atol=1e-4)
    many = jax.vmap(native.few_dots, in_axes=(0, None))(np.stack([x, 2 * x]), table)
    np.testing.assert_allclose(many[1], 2 * want, rtol=1e-5, atol=1e-4)


def test_a_tied_head_takes_it_for_few_rows_only():
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    embed, x = Embed(2048, 64, **options), jnp.asarray(normal(2, 2, 64))
    assert calls_kernel(embed.attend, x)
    assert not calls_kernel(embed.attend, jnp.ones((1, 5, 64)))
    assert not calls_kernel(Embed(2048, 64, **options | {"dtype": jnp.bfloat16}).attend, x)
    assert not calls_kernel(Embed(64, 64, **options).attend, x)
    want = np.asarray(x, np.float64) @ np.asarray(embed.embedding.get_value(), np.float64).T
    np.testing.assert_allclose(embed.attend(x), want, atol=1e-5)
