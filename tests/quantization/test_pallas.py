"""The Pallas kernel, operation by operation, against float64; and that Triton takes it, which needs no GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.native.codes import KINDS
from easydel.quantization import pallas

RNG = np.random.default_rng(0)
# Of the sum of the terms' sizes: float32 rounds each of some ten additions that follow one another to 6e-8.
TOLERANCE = 1e-6
SHAPES = [(77, 9, 16), (600, 6, 64), (1030, 3, 128)]  # with more than one block of codes, and blocks that are not full


def weights(kind: str, inputs: int, outputs: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and float64 weights."""
    scales = RNG.random((outputs, -(-inputs // group))).astype(np.float32)
    spread = np.repeat(scales.astype(np.float64), group, axis=1)[:, :inputs]
    if kind == "int8":
        codes = RNG.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        return codes, scales, codes * spread
    nibbles = RNG.integers(0, 16, (outputs, inputs + inputs % 2))
    codes = (nibbles[:, ::2] * 16 + nibbles[:, 1::2]).astype(np.uint8)
    if kind == "int4":
        return codes, scales, ((nibbles + 8) % 16 - 8)[:, :inputs] * spread
    points = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803]
    points += [0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    return codes, scales, np.float32(points).astype(np.float64)[nibbles[:, :inputs]] * spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_product_in_float64(kind, shape):
    codes, scales, want = weights(kind, *shape)
    multiply = jax.jit(functools.partial(pallas.multiply, kind=kind, group_size=shape[2], interpret=True))
    for rows in (1, 8) if shape == SHAPES[0] else (2,):
        x = RNG.standard_normal((rows, shape[0])).astype(np.float32)
        bound = TOLERANCE * (np.abs(x) @ np.abs(want).T)
        assert np.all(np.abs(np.asarray(multiply(x, codes, scales)) - x.astype(np.float64) @ want.T) <= bound)


def test_the_result_has_the_dtype_of_x():
    codes, scales, want = weights("nf4", *SHAPES[0])
    x = jnp.asarray(RNG.standard_normal((2, 77)), jnp.bfloat16)
    got = pallas.multiply(x, codes, scales, kind="nf4", group_size=16, interpret=True)
    assert got.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ want.T
    bound = 2.0**-8 * np.abs(exact) + TOLERANCE * (np.abs(np.asarray(x, np.float64)) @ np.abs(want).T)
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= bound)


@pytest.mark.parametrize("kind", KINDS)
def test_triton_takes_it_on_nvidia_gpus_alone(kind, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    codes, scales, want = weights(kind, *SHAPES[0])
    x = RNG.standard_normal((2, 77)).astype(np.float32)
    product = functools.partial(pallas.quantized_rows, kind=kind, group_size=16)

    def lowered(rows: int, platform: str) -> str:
        traced = jax.jit(product).trace(jnp.ones((rows, 77)), codes, scales)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "xla.gpu.triton" in lowered(2, "cuda")
    assert "xla.gpu.triton" not in lowered(9, "cuda")
    assert "xla.gpu.triton" not in lowered(2, "cpu")
    gradient = jax.grad(lambda x: product(x, codes, scales).sum())(x)  # of the float product; run here, on a CPU
    np.testing.assert_allclose(
        gradient, np.broadcast_to(want.sum(0), x.shape), rtol=1e-5, atol=1e-5 * np.abs(want).max()
    )


def test_without_a_gpu_it_is_the_product_of_the_native_room():
    codes, scales, _ = weights("int8", *SHAPES[0])
    text = jax.jit(functools.partial(pallas.quantized_rows, kind="int8", group_size=16))
    assert "triton" not in text.lower(jnp.ones((1, 77)), codes, scales).as_text()
    with pytest.raises(ValueError, match="expected int8"):
        pallas.quantized_rows(jnp.ones((1, 70)), codes, scales, kind="int8", group_size=16)
