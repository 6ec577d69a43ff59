"""Mixtures of experts against a naive float64 loop, in every way they are computed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import UnsupportedError, native
from easydel.layers import SparseMoE
from easydel.layers.moe.mechanisms import block_size
from easydel.loss import load_balancing_loss

HIDDEN, WIDTH = 8, 12
NATIVE = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
MECHANISMS = [pytest.param("grouped", marks=NATIVE), "blocks", "ragged"]
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}


def make(experts: int, top_k: int, **options: object) -> SparseMoE:
    return SparseMoE(
        HIDDEN, WIDTH, experts, top_k=top_k, act="silu", init_stddev=0.6, rngs=nnx.Rngs(0), **DTYPES, **options
    )


def naive(layer: SparseMoE, x: np.ndarray, normalize: bool) -> np.ndarray:
    """Compute token by token and expert by expert in float64."""
    experts = layer.experts
    router, gate, up, down = (
        np.asarray(part.kernel.get_value(), np.float64)
        for part in (layer.gate, experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    out = np.zeros(x.shape, np.float64)
    for place in np.ndindex(*x.shape[:-1]):
        token = x[place].astype(np.float64)
        likely = np.exp(token @ router)
        likely /= likely.sum()
        chosen = np.argsort(-likely)[: layer.gate.top_k]
        for e in chosen:
            gated = token @ gate[e]
            weight = likely[e] / (likely[chosen].sum() if normalize else 1.0)
            out[place] += weight * ((gated / (1 + np.exp(-gated)) * (token @ up[e])) @ down[e])
    return out


SIZES = [
    (4, 2, (2, 9)),
    (8, 2, (1, 1)),
    (3, 1, (1, 50)),
    (1, 1, (1, 3)),
    (8, 2, (3, 1)),
    (16, 3, (2, 5)),
    (2, 2, (1, 7)),
]
FORMS = [(*SIZES[0], True), (*SIZES[1], False), (*SIZES[2], True), (*SIZES[3], False)]
OTHERS = [(*size, normalize) for size in SIZES for normalize in (True, False) if (*size, normalize) not in FORMS]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(
    ("experts", "top_k", "shape", "normalize"),
    [*FORMS, *(pytest.param(*form, marks=pytest.mark.slow) for form in OTHERS)],
)
def test_every_form_is_the_naive_loop(
    experts: int, top_k: int, shape: tuple[int, int], normalize: bool, mechanism: str
) -> None:
    layer = make(experts, top_k, normalize=normalize, mechanism=mechanism)
    x = np.random.default_rng(0).normal(size=(*shape, HIDDEN)).astype(np.float32)
    got, logits = jax.jit(layer.__call__)(x)
    # Of sums of up to 20: some roundings of float32, 6e-8 each, which processors place differently.
    np.testing.assert_allclose(got, naive(layer, x, normalize), atol=2e-6, rtol=5e-7)
    np.testing.assert_allclose(logits, x @ np.asarray(layer.gate.kernel.get_value()), atol=1e-5)


def collapsed(mechanism: str) -> SparseMoE:
    """A layer that sends every token to the same two experts: the others have no rows, these have all."""
    layer = make(5, 2, mechanism=mechanism)
    kernel = np.zeros((HIDDEN, 5), np.float32)
    kernel[0] = [0.0, 9.0, 0.0, 5.0, 0.0]
    layer.gate.kernel.set_value(jnp.asarray(kernel))
    return layer


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_no_token_is_dropped_if_all_choose_the_same(mechanism: str) -> None:
    layer = collapsed(mechanism)
    x = np.abs(np.random.default_rng(0).normal(size=(2, 40, HIDDEN))).astype(np.float32) + 0.1
    np.testing.assert_allclose(jax.jit(layer.__call__)(x)[0], naive(layer, x, True), atol=2e-6)


def dense(layer: SparseMoE, params: nnx.State, x: jax.Array) -> jax.Array:
    """Compute all experts for all tokens, in plain autodiff's reach."""
    nnx.update(layer, params)
    routing, experts = layer.gate(x), layer.experts
    gate, up, down = (part.kernel.get_value() for part in (experts.gate_proj, experts.up_proj, experts.down_proj))
    hidden = jax.nn.silu(jnp.einsum("bsh,ehf->bsef", x, gate)) * jnp.einsum("bsh,ehf->bsef", x, up)
    every = jnp.einsum("bsef,efh->bseh", hidden, down)
    chosen = jnp.take_along_axis(every, routing.experts[..., None], axis=2)
    return jnp.sum(chosen * routing.weights[..., None], axis=2)


@functools.cache
def gradients(case: str, mechanism: str, compute: Callable) -> list[jax.Array]:
    layer = collapsed(mechanism) if case == "collapsed" else make(4, 2, mechanism=mechanism)
    shape = (1, 1, HIDDEN) if case == "one_token" else (2, 30, HIDDEN)
    x, weight = (jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) for seed in (0, 1))
    graphdef, params = nnx.split(layer)

    def loss(params: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(compute(nnx.merge(graphdef, params), params, x) * weight)

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))


def itself(layer: SparseMoE, _: nnx.State, x: jax.Array) -> jax.Array:
    return layer(x)[0]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("case", ["spread", "collapsed", "one_token"])
def test_gradients_are_those_of_computing_everything(case: str, mechanism: str) -> None:
    got, want = gradients(case, mechanism, itself), gradients(case, "ragged", dense)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(float(jnp.abs(other).max()), 1e-3))


@pytest.mark.parametrize("mechanism", ["blocks", "ragged"])
def test_bfloat16(mechanism: str) -> None:
    layer = make(4, 2, mechanism=mechanism)
    x = np.random.default_rng(0).normal(size=(1, 9, HIDDEN)).astype(np.float32)
    want = naive(layer, x, True)
    for module in (layer.gate, layer.experts, *(getattr(layer.experts, f"{n}_proj") for n in ("gate", "up", "down"))):
        module.dtype = jnp.bfloat16
    got, logits = jax.jit(layer.__call__)(jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03 * np.abs(want).max())  # 1/256, six products


def test_the_kernel_for_float32_refuses_other_numbers() -> None:
    layer = make(4, 2, mechanism="grouped")
    for module in (layer.experts, layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj):
        module.dtype = jnp.bfloat16
    with pytest.raises(UnsupportedError, match=r"needs the C\+\+ kernels and float32, got bfloat16.*'auto'"):
        layer(jnp.ones((1, 3, HIDDEN), jnp.bfloat16))
    layer.experts.mechanism = "auto"
    assert jax.jit(layer.__call__)(jnp.ones((1, 3, HIDDEN), jnp.bfloat16))[0].shape == (1, 3, HIDDEN)


@pytest.mark.parametrize(("rows", "experts"), [(1, 8), (2, 8), (16, 8), (1024, 32), (1024, 8), (100_000, 8)])
def test_blocks_are_no_larger_than_what_there_is(rows: int, experts: int) -> None:
    assert 1 <= block_size(rows, experts) <= rows


def test_balance_is_least_when_even() -> None:
    even = jnp.tile(jnp.eye(4) * 20, (1, 3, 1))
    assert float(load_balancing_loss([even], 1)) == pytest.approx(1.0, rel=1e-4)
    assert float(load_balancing_loss([even[:, :1]], 1)) == pytest.approx(4.0, rel=1e-4)
    mask = np.zeros((1, 12), np.int32)
    mask[0, 0] = 1
    assert float(load_balancing_loss([even], 1, mask)) == pytest.approx(4.0, rel=1e-4), "padding does not count"
