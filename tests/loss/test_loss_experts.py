"""The losses of a mixture of experts' routers, against transformers and formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LossConfig
from easydel.loss import load_balancing_loss, router_z_loss, task_loss

RNG = np.random.default_rng(4)
LAYERS, BATCH, LENGTH, EXPERTS, TOP = 3, 2, 5, 6, 2
ROUTERS = [RNG.normal(size=(BATCH, LENGTH, EXPERTS)).astype(np.float32) * 2 for _ in range(LAYERS)]
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_balancing_loss_and_gradient_are_those_of_transformers(mask):
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    theirs = [torch.tensor(r.reshape(-1, EXPERTS), requires_grad=True) for r in ROUTERS]
    expected = load_balancing_loss_func(tuple(theirs), EXPERTS, TOP, None if mask is None else torch.tensor(mask))
    expected.backward()
    given = list(map(jnp.asarray, ROUTERS))
    loss, gradients = jax.value_and_grad(lambda routers: load_balancing_loss(routers, TOP, mask))(given)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for got, want in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(got.reshape(-1, EXPERTS), want.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("mask", [None, MASK, np.concatenate([np.zeros((2, 3), np.int32), MASK], 1)], ids=str)
def test_router_z_loss_is_the_formula(mask):
    wide = np.stack(ROUTERS).astype(np.float64)
    squares = np.log(np.exp(wide).sum(-1)) ** 2
    kept = np.ones((BATCH, LENGTH), bool) if mask is None else mask[:, -LENGTH:] == 1
    loss = router_z_loss(list(map(jnp.asarray, ROUTERS)), mask)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, squares[:, kept].mean(), rtol=1e-6)


def test_nothing_but_padding_costs_nothing():
    for loss in (router_z_loss(ROUTERS, 0 * MASK), load_balancing_loss(ROUTERS, TOP, 0 * MASK)):
        assert loss == 0


def test_both_are_added_by_their_coefficients():
    logits, labels = RNG.normal(size=(1, 4, 7)).astype(np.float32), np.asarray([[1, 2, 3, 4]])
    plain, _ = task_loss("causal-lm", logits, labels)
    config = LossConfig(auxiliary_loss_coefficient=0.5, router_z_loss_coefficient=0.25)
    experts = {"auxiliary_loss": jnp.float32(2), "router_z_loss": jnp.float32(3)}
    loss, metrics = task_loss("causal-lm", logits, labels, config, **experts)
    np.testing.assert_allclose(loss, plain + 0.5 * 2 + 0.25 * 3, rtol=1e-6)
    assert metrics["loss"] == loss
    assert {name: metrics[name] for name in experts} == experts
