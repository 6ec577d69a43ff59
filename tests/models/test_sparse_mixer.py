"""Phi-3.5 MoE's router in training: how experts are drawn, what they weigh, and with which gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel.models.phimoe import PhimoeMLP, SparseMixer

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}
JITTER, ROWS = 0.4, 4000
LOGITS = np.array([1.0, 0.4, -0.2, 0.7, 0.1], np.float32)


def in_training() -> SparseMixer:
    layer = SparseMixer(3, LOGITS.size, top_k=2, jitter=JITTER, rngs=nnx.Rngs(0), **DTYPES)
    layer.train()
    return layer


def probabilities(left: np.ndarray) -> np.ndarray:
    """Return those of the experts that are left (not -inf) and near to the best, in float64."""
    best = left.max()
    near = (best - LOGITS) / np.maximum(np.abs(LOGITS), best) <= 2 * JITTER
    powers = np.where(near & np.isfinite(left), np.exp(LOGITS.astype(np.float64) - best), 0.0)
    return powers / powers.sum()


def without(expert: int) -> np.ndarray:
    return np.where(np.arange(LOGITS.size) == expert, -np.inf, LOGITS)


def test_experts_are_drawn_by_their_probabilities_and_weigh_a_third_or_all() -> None:
    weights, experts = (np.asarray(x) for x in in_training().choose(jnp.broadcast_to(LOGITS, (ROWS, 1, LOGITS.size))))
    weights, experts = weights[:, 0], experts[:, 0]
    first = probabilities(LOGITS)
    assert 1 < (first > 0).sum() < LOGITS.size, "all or one are near: that tests nothing"
    shares = np.bincount(experts[:, 0], minlength=LOGITS.size) / ROWS
    np.testing.assert_allclose(shares, first, atol=0.035)  # four deviations of a share of 4000
    assert (experts[:, 0] != experts[:, 1]).all()
    for taken in np.flatnonzero(first):
        second, rows = probabilities(without(taken)), experts[:, 0] == taken
        shares = np.bincount(experts[rows, 1], minlength=LOGITS.size) / rows.sum()
        np.testing.assert_allclose(shares, second, atol=2 / rows.sum() ** 0.5)
        ratios = weights[rows, 1] / second[experts[rows, 1]]
        is_best = experts[rows, 1] == second.argmax()
        np.testing.assert_allclose(ratios[is_best], 1.0, rtol=1e-5)
        others = ratios[~is_best]
        np.testing.assert_allclose(np.where(others < 0.5, others * 3, others), 1.0, rtol=1e-5)
        if others.size > 100:
            assert abs((others > 0.5).mean() - 0.25) < 2 / others.size**0.5


def test_the_gradient_is_that_of_the_whole_weight() -> None:
    graphdef, state = nnx.split(in_training())  # the same draws each time

    def chosen(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, experts = nnx.merge(graphdef, state, copy=True).choose(logits)
        return weights[..., 0].sum(), (weights[:, 0, 0], experts[:, 0, 0])

    rows = jnp.broadcast_to(LOGITS, (64, 1, LOGITS.size))
    gradients, (weights, experts) = jax.grad(chosen, has_aux=True)(rows)
    p = probabilities(LOGITS)
    assert (np.asarray(weights) < 0.5 * p[np.asarray(experts)]).any(), "no weight was cut"
    for gradient, expert in zip(np.asarray(gradients)[:, 0], np.asarray(experts), strict=True):
        want = p[expert] * ((np.arange(LOGITS.size) == expert) - p)
        np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_noise_on_the_input_is_for_training() -> None:
    fields = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_local_experts": 3}
    config, plain = (easydel.PhimoeConfig(**fields, input_jitter_noise=noise) for noise in (0.3, 0.0))
    layer, without_noise = (PhimoeMLP(c, rngs=nnx.Rngs(0), **DTYPES) for c in (config, plain))
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    np.testing.assert_array_equal(layer(x)[1], without_noise(x)[1])
    layer.train()
    layer.gate.eval()  # which expert is drawn is another matter
    router = np.asarray(layer.gate.kernel.get_value())
    noise = np.linalg.lstsq(router.T, np.asarray(layer(x)[1] - without_noise(x)[1])[0].T, rcond=None)[0]
    assert np.abs(noise).max() > 1e-2
    assert np.abs(np.asarray(layer(x)[1] - layer(x)[1])).max() > 0, "drawn once for all"


def test_only_two_experts_can_be_chosen() -> None:
    with pytest.raises(easydel.UnsupportedError, match="num_experts_per_tok=3"):
        SparseMixer(3, 5, top_k=3, jitter=JITTER, rngs=nnx.Rngs(0), **DTYPES)
