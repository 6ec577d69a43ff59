"""Schedules and optimizers against formulas in float64, and against what optax offers by itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easydel import UnsupportedError
from easydel.paths import each_layer, flatten
from easydel.training import TrainingArguments
from easydel.training.optimizers import OPTIMIZERS, is_matrix, make_optimizer, make_schedule
from tests.training.runs import tiny_llama

PEAK, TOTAL = 3e-3, 20


def given(**fields):
    return TrainingArguments("out", learning_rate=PEAK, **fields)


def expected_rate(schedule, step, warmup, ratio, decay=0.2):
    low, left = PEAK * ratio, TOTAL - warmup
    if step < warmup:
        return PEAK * step / warmup
    done = (step - warmup) / left
    if schedule == "cosine":
        return low + (PEAK - low) * (1 + math.cos(math.pi * done)) / 2
    falling = round(left * decay)
    begun = {"constant": math.inf, "linear": warmup, "wsd": TOTAL - falling}[schedule]
    share = max(step - begun, 0) / (left if schedule == "linear" else falling)
    return PEAK + (low - PEAK) * share


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        ("constant", 0.0),
        ("linear", 0.0),
        ("linear", 0.1),
        ("cosine", 0.0),
        ("cosine", 0.25),
        ("wsd", 0.0),
        ("wsd", 0.5),
    ],
)
def test_each_step_of_a_schedule(schedule, ratio, warmup):
    rate = make_schedule(given(schedule=schedule, min_learning_rate_ratio=ratio, warmup_steps=warmup), TOTAL)
    got = [float(rate(step)) for step in range(TOTAL)]
    wanted = [expected_rate(schedule, step, warmup, ratio) for step in range(TOTAL)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * PEAK)  # optax computes in float32


def test_shares_of_the_run():
    steps, share = (
        make_schedule(given(schedule="wsd", **warmup), TOTAL)
        for warmup in ({"warmup_steps": 5}, {"warmup_ratio": 0.25})
    )
    assert [float(steps(i)) for i in range(TOTAL)] == [float(share(i)) for i in range(TOTAL)]
    half = make_schedule(given(schedule="wsd", decay_ratio=0.5), TOTAL)
    assert float(half(10)) == pytest.approx(PEAK)
    assert float(half(15)) == pytest.approx(PEAK / 2)


@pytest.mark.parametrize(
    ("fields", "total", "message"),
    [
        ({}, None, "schedule='linear' needs to know where the run ends"),
        ({"schedule": "constant", "warmup_ratio": 0.1}, None, "needs to know where the run ends"),
        ({"warmup_steps": 20}, 20, "a warmup of 20 steps is as long as the run of 20"),
        ({"schedule": "wsd"}, 2, r"decay_ratio=0.2 of the 2 steps after the warmup is not a single one"),
    ],
)
def test_schedules_without_room(fields, total, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(given(**fields), total)


RANDOM = np.random.default_rng(0)
PARAMS = {"w": RANDOM.normal(size=(3, 4)), "norm": RANDOM.normal(size=4)}
GRADS = [{"w": RANDOM.normal(size=(3, 4)), "norm": RANDOM.normal(size=4)} for _ in range(4)]


def trained(optimizer, grads=GRADS):
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grad), state, params)
        params = optax.apply_updates(params, updates)
    return params


def made(total=None, **fields):
    arguments = given(**{"schedule": "constant", "max_grad_norm": None} | fields)
    return make_optimizer(arguments, make_schedule(arguments, total))


def by_formula(update, grads=GRADS):
    """`update(m, v, g, p, t, wd)` → new m, v, direction: of each tensor alone, in float64."""
    result = {}
    for name, param in PARAMS.items():
        m, v, p = np.zeros_like(param), np.zeros_like(param), param
        for t, grad in enumerate(grads, 1):
            m, v, direction = update(m, v, grad[name], p, t, 0.1 if param.ndim > 1 else 0.0)
            p = p - PEAK * direction
        result[name] = p
    return result


def adam(decays):
    def update(m, v, g, p, t, wd):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        return m, v, m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + decays * wd * p

    return update


def lion(m, v, g, p, t, wd):
    return 0.9 * m + 0.1 * g, v, np.sign(0.8 * m + 0.2 * g) + wd * p


def sgd(m, v, g, p, t, wd):
    m = 0.7 * m + g
    return m, v, m


BETAS = {"adam_beta1": 0.8, "adam_beta2": 0.9}


@pytest.mark.parametrize(
    ("fields", "update"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1, "adam_epsilon": 1e-3, **BETAS}, adam(1)),
        ({"optimizer": "adam", "adam_epsilon": 1e-3, **BETAS}, adam(0)),
        ({"optimizer": "lion", "weight_decay": 0.1, **BETAS}, lion),
        ({"optimizer": "sgd", "momentum": 0.7}, sgd),
    ],
    ids=["adamw", "adam", "lion", "sgd"],
)
def test_an_optimizer_is_its_formula(fields, update):
    got, wanted = trained(made(**fields)), by_formula(update)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-6, err_msg=name)  # float32 against float64


def test_gradients_are_clipped_by_their_common_norm():
    norm = math.sqrt(sum(float((g**2).sum()) for g in GRADS[0].values()))
    clipped = trained(made(optimizer="sgd", max_grad_norm=norm / 4), GRADS[:1])
    for name in PARAMS:
        np.testing.assert_allclose(clipped[name], PARAMS[name] - PEAK * GRADS[0][name] / 4, rtol=1e-6)
    larger = trained(made(optimizer="sgd", max_grad_norm=norm * 4), GRADS[:1])
    free = trained(made(optimizer="sgd"), GRADS[:1])
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), larger, free))


def test_adafactor_is_optax_s_with_a_decay_that_goes_with_the_rate():
    plain, ours = trained(optax.adafactor(PEAK)), trained(made(optimizer="adafactor"))
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], plain[name], rtol=1e-6)
    once, decayed = (trained(made(optimizer="adafactor", weight_decay=w), GRADS[:1]) for w in (0.0, 0.1))
    np.testing.assert_allclose(decayed["w"] - once["w"], -PEAK * 0.1 * PARAMS["w"], rtol=1e-2, atol=1e-7)  # difference
    np.testing.assert_array_equal(decayed["norm"], once["norm"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer):
    start = jax.tree.map(lambda p: jnp.float32(p) + 1, PARAMS)
    step, params = made(optimizer=optimizer), start
    state = step.init(params)
    for _ in range(3):  # downhill to 0
        updates, state = step.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert float(optax.tree.norm(params)) < float(optax.tree.norm(start))


def test_layers_of_a_stack_decay_as_if_they_stood_alone():
    one_by_one = flatten(is_matrix(tiny_llama(num_hidden_layers=2).params))
    stacked = flatten(is_matrix(tiny_llama(num_hidden_layers=2, scan_layers=True).params), by_layer=False)
    assert any(":" in path for path in stacked)  # it is stored stacked
    spread = each_layer({path: np.array([value] * 2) if ":" in path else value for path, value in stacked.items()})
    assert {path: bool(value) for path, value in spread.items()} == one_by_one
    assert one_by_one["model/layers/0/mlp/up_proj/kernel"] is True
    assert one_by_one["model/layers/0/input_layernorm/scale"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer": "sgd", "weight_decay": 0.1},
            "weight_decay=0.1 has no effect with optimizer='sgd', only with adamw",
        ),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay=0.1 has no effect"),
        ({"momentum": 0.9}, "momentum=0.9 has no effect with optimizer='adamw', only with sgd"),
        ({"optimizer": "lion", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06 has no effect"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1=0.8 has no effect"),
        ({"optimizer": "sgd", "adam_beta2": 0.8}, "adam_beta2=0.8 has no effect"),
        ({"decay_ratio": 0.3}, "decay_ratio=0.3 has no effect with schedule='linear', only with wsd"),
        ({"schedule": "constant", "min_learning_rate_ratio": 0.1}, "min_learning_rate_ratio=0.1 has no effect"),
    ],
)
def test_what_has_no_effect_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        given(**fields)


@pytest.mark.parametrize(("name", "value"), [("optimizer", "adamx"), ("schedule", "step"), ("log_to", ["wandb"])])
def test_unknown_names(name, value):
    with pytest.raises(UnsupportedError, match="is not supported; choose one of"):
        given(**{name: value})
