"""base_module.md: Loss Computation, Loss Configuration, EasyDeLState, FLOPs, Static Arguments, Transform Functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easydel.infra import EasyDeLState, LossConfig
from easydel.paths import flatten, named_variables
from tests.spec.conftest import arrays


def next_token_loss(logits, labels) -> float:
    """Cross-entropy of each token with the one before it, in float64."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], np.asarray(labels)[:, 1:]
    partition = np.log(np.exp(logits).sum(-1))
    losses = partition - np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return float(losses[labels != -100].mean())


@pytest.fixture
def labels(input_ids):
    return input_ids.at[0, 3].set(-100)


def test_loss_in_forward_and_separately(case, model, input_ids, attention_mask, labels):
    expected = next_token_loss(case.logits(model, input_ids), labels)
    # Compute loss during forward pass
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,  # Providing labels triggers loss computation
    )
    loss = outputs.loss
    assert loss.dtype == jnp.float32
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    # Or compute loss separately
    loss_config = LossConfig(
        loss_type="cross_entropy",
        label_smoothing=0.0,
        z_loss_coefficient=0.0,
        auxiliary_loss_coefficient=0.001,  # For MoE models
    )
    loss, metrics = model.compute_loss(
        labels=labels,
        logits=outputs.logits,
        config=loss_config,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["loss"] == loss
    assert metrics["num_tokens"] == 13
    right = np.asarray(outputs.logits)[:, :-1].argmax(-1) == np.asarray(labels)[:, 1:]
    np.testing.assert_allclose(metrics["accuracy"], right.sum() / 13, rtol=1e-6)


def test_loss_without_logits_runs_the_forward_pass(case, model, input_ids, labels):
    loss, _ = model.compute_loss(labels=labels, input_ids=input_ids)
    np.testing.assert_allclose(loss, next_token_loss(case.logits(model, input_ids), labels), rtol=1e-5)


def test_loss_config_reaches_the_forward_pass(case, model, input_ids):
    logits = np.asarray(case.logits(model, input_ids), np.float64)[:, :-1]
    smooth = LossConfig(label_smoothing=0.1, z_loss_coefficient=0.01)
    outputs = model(input_ids=input_ids, labels=input_ids, loss_config=smooth)
    partition = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.asarray(input_ids)[:, 1:, None], -1)[..., 0]
    expected = partition - 0.9 * target - 0.1 * logits.mean(-1) + 0.01 * partition**2
    np.testing.assert_allclose(outputs.loss, expected.mean(), rtol=1e-5)


def test_state_and_a_compiled_update(case, model, input_ids):
    model.shard_model(mesh=case.mesh)
    placed = {path: leaf.sharding for path, leaf in flatten(model.params).items()}
    before = arrays(model.params)
    # Convert model to training state
    state = model.to_state(
        optimizer=optax.adamw(learning_rate=1e-4),
    )
    assert isinstance(state, EasyDeLState)
    assert state.step == 0
    assert state.params["embed_tokens" if case.name != "llama" else "model"] is not None
    transform_fn = model.pure_transform_fn()

    @jax.jit
    def update(state, inputs):
        grads = jax.grad(lambda params: transform_fn(params, inputs).loss)(state.params)
        return state.apply_gradients(grads), grads

    new, grads = update(state, {"input_ids": input_ids, "labels": input_ids})
    assert new.step == 1
    for path, grad in arrays(grads).items():
        # AdamW's first step in float64: both moments are the gradient's own
        grad, weight = grad.astype(np.float64), before[path].astype(np.float64)
        expected = weight - 1e-4 * (grad / (np.abs(grad) + 1e-8) + 1e-4 * weight)
        # the direction of a gradient of rounding size is arbitrary: 1e-7 is the last bit of weights about 1
        sure = np.abs(grad) > 1e-6
        np.testing.assert_allclose(arrays(new.params)[path][sure], expected[sure], atol=3e-6, err_msg=path)
    assert any((arrays(new.params)[path] != value).any() for path, value in before.items())
    for path, value in arrays(model.params).items():
        np.testing.assert_array_equal(value, before[path], err_msg="the model itself is not trained")
    for path, moment in flatten(state.opt_state[0].mu).items():
        assert moment.sharding == placed[path], path
    trained = new.model
    assert type(trained) is case.cls
    assert case.logits(trained, input_ids).shape == case.logits(model, input_ids).shape
    assert np.abs(case.logits(trained, input_ids) - case.logits(model, input_ids)).max() > 1e-5


def test_transform_function(case, model, input_ids):
    # Get a pure transform function (no side effects)
    transform_fn = model.pure_transform_fn()

    # Use in JAX transformations
    @jax.jit
    def train_step(params, inputs):
        outputs = transform_fn(params, inputs)
        return outputs.loss

    inputs = {"input_ids": input_ids, "labels": input_ids}
    params = model.shard_model(mesh=case.mesh).params
    loss = train_step(params, inputs)
    np.testing.assert_allclose(loss, next_token_loss(case.logits(model, input_ids), input_ids), rtol=1e-5)

    @jax.jit
    def slopes(params, inputs):
        grads = jax.grad(train_step)(params, inputs)
        norm, step = optax.tree.norm(grads), 1e-2
        ahead = jax.tree.map(lambda p, g: p + step * g / norm, params, grads)
        behind = jax.tree.map(lambda p, g: p - step * g / norm, params, grads)
        return norm, (train_step(ahead, inputs) - train_step(behind, inputs)) / (2 * step)

    # the central difference along the gradient is its norm; 2% for curvature and float32
    norm, measured = slopes(params, inputs)
    np.testing.assert_allclose(measured, norm, rtol=0.02)


def test_pure_function_accepts_an_array_and_leaves_the_model(case, model, input_ids):
    before = {path: id(v.get_value()) for path, v in named_variables(model).items()}
    outputs = jax.jit(model.pure_transform_fn())(model.params, input_ids)
    logits = outputs if case.returns_array else outputs.logits
    np.testing.assert_allclose(logits, case.logits(model, input_ids), atol=1e-6)
    assert {path: id(v.get_value()) for path, v in named_variables(model).items()} == before


def test_static_arguments(case, model, input_ids):
    # Get static argument names
    static_args = model.get_static_arguments()
    names = {"loss_config", "output_hidden_states", "output_attentions"} if case.name == "llama" else set()
    assert {*static_args} == names
    # Prepare inputs with static args handled correctly
    inputs = {"input_ids": input_ids.tolist(), "attention_mask": None}
    prepared_inputs = model.prepare_inputs_for_call(**inputs)
    assert {*prepared_inputs} == {"input_ids"}
    assert isinstance(prepared_inputs["input_ids"], jax.Array)
    assert prepared_inputs["input_ids"].dtype == jnp.int32
    compiled = jax.jit(lambda **kwargs: model(**kwargs), static_argnames=static_args)
    outputs = compiled(**prepared_inputs, **({"output_hidden_states": True} if names else {}))
    logits = outputs if case.returns_array else outputs.logits
    np.testing.assert_allclose(logits, case.logits(model, input_ids), atol=1e-6)


def test_flops(case, model):
    config, batch_size, sequence_length = model.config, 1, 2048
    # Calculate FLOPs per token
    flops = model.flops_per_token(
        batch_size=1,
        sequence_length=2048,
    )
    h, v = config.hidden_size, config.vocab_size
    by_hand = {
        "my_model": 2 * (4 * h * h + h * v),
        "mixing": 2 * (2 * h * h + h * v),
        # q and o: h×h, k and v: h×h/2, three MLP products of h×2h, two attention products of h×2048
        "llama": 2 * (3 * h * h + 6 * h * h + 2 * h * 2048 + h * v),
    }[case.name]
    assert flops == by_hand
    # Low-level FLOP calculation
    flops = model._flop(config, batch_size, sequence_length)
    assert flops == 2048 * by_hand
    assert model._flop(config, 3, 2048) == 3 * flops


def test_a_state_keeps_the_definition_of_its_model(case, model):
    assert nnx.split(model)[0] == model.to_state(optax.sgd(0.1)).model.graphdef
