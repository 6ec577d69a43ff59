"""The compiled step: accumulation, what is skipped, what it costs on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easydel import LossConfig
from easydel.infra.compilation import CompilationCounter
from easydel.sharding import create_mesh
from easydel.training import StepSettings, TrainStep
from easydel.training.sources import place_batch
from easydel.training.step import accumulate
from tests.training.runs import batch_of, bits, numbers, tiny_llama

SGD = optax.sgd(0.5)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def largest_difference(one, two):
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


MEAN, SUM = LossConfig(label_smoothing=0.1, z_loss_coefficient=1e-3), LossConfig(reduction="sum")
COUNTED = [(2, MEAN), (8, SUM)]
MORE = [(2, None), (8, None), (8, MEAN), (2, SUM)]


@pytest.mark.parametrize(
    ("count", "config"), [*COUNTED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_micro_batches_give_the_gradients_of_one_batch(count, config):
    model = tiny_llama(attention_dropout=0.0)
    batch = place_batch(batch_of(0), None)
    state = model.to_state(SGD)
    # micro-batches differ in how many labels count
    (grads, told), (grads_parts, told_parts) = (
        jax.jit(accumulate, static_argnums=2)(state, batch, StepSettings(config, steps), None) for steps in (1, count)
    )
    for name in ("loss", "accuracy", "num_tokens"):
        np.testing.assert_allclose(told_parts[name], told[name], rtol=1e-6, err_msg=name)
    assert largest_difference(grads_parts, grads) < 1e-6  # of each tensor's largest element


def test_a_step_is_what_optax_makes_of_the_gradient():
    model = tiny_llama(attention_dropout=0.0)
    batch = place_batch(batch_of(1), None)
    step = TrainStep(model.to_state(ADAM))
    pure = model.pure_transform_fn()

    @jax.jit
    def by_hand(params):
        grads = jax.grad(lambda params: pure(params, batch).loss)(params)
        updates, _ = ADAM.update(grads, ADAM.init(params), params)
        return optax.tree.norm(grads), optax.apply_updates(params, updates)

    norm, params = by_hand(model.params)
    told = step(batch)
    np.testing.assert_allclose(told["grad_norm"], norm, rtol=1e-5)
    assert largest_difference(step.state.params, params) < 1e-5


def test_the_model_stays_usable_unless_it_is_given_away():
    model = tiny_llama()
    before = bits(model.params)
    TrainStep(model.to_state(SGD))(place_batch(batch_of(0), None))
    assert bits(model.params) == before
    TrainStep(model.to_state(SGD), keep=False)(place_batch(batch_of(0), None))
    assert model.params["lm_head"]["kernel"].is_deleted()


def test_what_is_not_finite_changes_nothing_and_is_told():
    model = tiny_llama()
    poisoned = model.params["lm_head"]["kernel"].at[3, 5].set(jnp.nan)
    step = TrainStep(model.to_state(ADAM))
    for params, finite in ((model.params, True), ({"lm_head": {"kernel": poisoned}}, False)):
        step.restore(jax.tree.map(jnp.copy, model.merge_params_dict(params).to_state(ADAM)), 0)
        before = numbers(step.state)
        told = step(place_batch(batch_of(0), None))
        assert bool(told["is_finite"]) is finite
        assert (numbers(step.state) == before) is not finite
        assert int(step.state.step) == int(finite)
        assert step.iteration == 1


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    class Cliff(type(tiny_llama())):
        def __call__(self, input_ids, labels=None, loss_config=None):
            scale = self.model.norm.scale
            loss = jnp.sqrt(jnp.abs(scale - scale)).sum()  # 0, with the slope of a square root there
            return super().__call__(input_ids=input_ids).replace(loss=loss, logits=loss * jnp.ones((8, 12, 32)))

    model = Cliff(tiny_llama().config, rngs=nnx.Rngs(0))
    step = TrainStep(model.to_state(ADAM))
    before = numbers(step.state)
    told = step(place_batch(batch_of(0), None))
    assert np.isfinite(told["loss"])
    assert not bool(told["is_finite"])
    assert numbers(step.state) == before


def test_dropout_depends_on_seed_and_step_alone():
    model, batch = tiny_llama(attention_dropout=0.5), place_batch(batch_of(0), None)
    steps = [TrainStep(model.to_state(SGD), StepSettings(seed=seed)) for seed in (0, 1)]
    losses, params = [], []
    for step in (steps[0], *steps):
        step.restore(jax.tree.map(jnp.copy, model.to_state(SGD)), 0)
        losses.append([float(step(batch)["loss"]) for _ in range(2)])
        params.append(bits(step.state.params))
    assert losses[0] == losses[1] != losses[2]
    assert params[0] == params[1]


# The run of chats in test_elarge.py is split over fsdp and tp.
SLOW = [(1, 8, 1, 1, 1), (2, 2, 1, 2, 1)]


@pytest.mark.parametrize("dims", [(1, 2, 1, 2, 2), *(pytest.param(dims, marks=pytest.mark.slow) for dims in SLOW)])
def test_on_a_mesh_everything_stays_where_it_was(dims):
    model = tiny_llama(attention_dropout=0.0)
    alone = TrainStep(model.to_state(SGD), StepSettings(gradient_accumulation_steps=2))
    sharded = tiny_llama(attention_dropout=0.0).shard_model(mesh=create_mesh(dims))
    step = TrainStep(sharded.to_state(SGD), StepSettings(gradient_accumulation_steps=2))
    places = [leaf.sharding for leaf in jax.tree.leaves(step.state)]
    for index in range(2):
        alone(place_batch(batch_of(index), None))
        step(place_batch(batch_of(index), sharded.mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(step.state)] == places
    assert largest_difference(step.state.params, alone.state.params) < 1e-5


def test_compiles_once():
    step, batch = TrainStep(tiny_llama().to_state(SGD)), place_batch(batch_of(0), None)
    step(batch)
    with CompilationCounter() as counter:
        for index in range(3):
            step(place_batch(batch_of(index), None))
    assert counter.count == 0


def test_a_batch_that_does_not_split_is_refused():
    step = TrainStep(tiny_llama().to_state(SGD), StepSettings(gradient_accumulation_steps=3))
    with pytest.raises(ValueError, match="8 rows cannot be split into gradient_accumulation_steps=3"):
        step(place_batch(batch_of(0), None))
