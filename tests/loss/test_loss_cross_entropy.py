"""Cross-entropy against float64 formulas and torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LossConfig, UnsupportedError
from easydel.loss import cross_entropy, task_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 6, 11)).astype(np.float32) * 3
LABELS = RNG.integers(0, 11, (2, 6))
LABELS[0, 1] = LABELS[1, 4:] = -100


def reference(logits, labels, smoothing=0.0, z=0.0, reduction="mean", ignore=-100):
    """Return loss, z-loss and accuracy in float64, by the definition: cross-entropy with soft targets."""
    logits = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    logits, labels = logits[labels != ignore], labels[labels != ignore]
    partition = np.log(np.exp(logits).sum(-1))
    soft = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
    losses = -(soft * (logits - partition[:, None])).sum(-1)
    reduce = np.mean if reduction == "mean" else np.sum
    return reduce(losses) + reduce(z * partition**2), reduce(z * partition**2), (logits.argmax(-1) == labels).mean()


CONFIGS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"z_loss_coefficient": 0.01},
    {"label_smoothing": 0.3, "z_loss_coefficient": 0.1, "reduction": "sum"},
    {"ignore_index": 3},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_cross_entropy_is_the_formula(fields):
    labels = np.where(LABELS == -100, 3, LABELS) if "ignore_index" in fields else LABELS
    names = {"label_smoothing": "smoothing", "z_loss_coefficient": "z", "ignore_index": "ignore"}
    expected, z, accuracy = reference(LOGITS, labels, **{names.get(k, k): v for k, v in fields.items()})
    config = LossConfig(**fields)
    loss, metrics = jax.jit(cross_entropy, static_argnums=2)(LOGITS, labels, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert loss.dtype == jnp.float32
    assert metrics["loss"] == loss
    assert metrics["num_tokens"] == (labels != config.ignore_index).sum()
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert ("z_loss" in metrics) == bool(config.z_loss_coefficient)
    if "z_loss" in metrics:
        np.testing.assert_allclose(metrics["z_loss"], z, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_are_those_of_torch(smoothing, reduction):
    import torch

    theirs = torch.tensor(LOGITS, requires_grad=True)
    kinds = {"label_smoothing": smoothing, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy(theirs.reshape(-1, 11), torch.tensor(LABELS).reshape(-1), **kinds)
    expected.backward()
    config = LossConfig(**kinds)
    loss, grad = jax.value_and_grad(lambda x: cross_entropy(x, jnp.asarray(LABELS), config)[0])(jnp.asarray(LOGITS))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), atol=1e-6)
    assert (np.asarray(grad)[LABELS == -100] == 0).all()


def test_causal_loss_predicts_the_next_token():
    loss, metrics = task_loss("causal-lm", LOGITS, LABELS)
    expected, _, _ = reference(LOGITS[:, :-1], LABELS[:, 1:])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["num_tokens"] == (LABELS[:, 1:] != -100).sum()
    base, _ = task_loss("base", LOGITS, LABELS)
    assert base == loss


def test_no_label_at_all_costs_nothing():
    loss, metrics = task_loss("causal-lm", LOGITS, np.full((2, 6), -100))
    assert loss == 0
    assert metrics["accuracy"] == metrics["num_tokens"] == 0


def test_half_precision_logits_are_summed_in_float32():
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    expected, _, _ = reference(np.asarray(half, np.float32), LABELS)
    loss, _ = cross_entropy(half, jnp.asarray(LABELS), LossConfig())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_large_logits_do_not_overflow():
    loss, _ = cross_entropy(jnp.asarray([[1e4, -1e4]]), jnp.asarray([1]), LossConfig())
    np.testing.assert_allclose(loss, 2e4)


@pytest.mark.parametrize("label", [11, 400, -1, -99])
def test_a_label_outside_the_classes_gives_nan(label):
    labels = LABELS.copy()
    labels[0, 2] = label
    assert np.isnan(task_loss("causal-lm", LOGITS, labels)[0])
    assert np.isnan(task_loss("sequence-classification", LOGITS[0], labels[0])[0])


BAD_CALLS = {
    "width": ("causal-lm", LOGITS, LABELS[:, :5], ValueError, r"\(2, 5\) do not fit logits of shape \(2, 6, 11\)"),
    "rank": ("causal-lm", LOGITS, LABELS[0], ValueError, "do not fit"),
    "floats": ("causal-lm", LOGITS, LABELS * 1.0, ValueError, "must be integers, got float"),
    "classes": ("sequence-classification", LOGITS[0], LABELS[0, :3], ValueError, "do not fit"),
    "scores": ("sequence-classification", LOGITS[0], np.ones((6, 3)), ValueError, r"needs labels of the logits' shape"),
    "task": ("speech-seq2seq", LOGITS, LABELS, UnsupportedError, "'speech-seq2seq' is not supported"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_labels_that_do_not_belong_to_the_logits_raise(name):
    task, logits, labels, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        task_loss(task, logits, labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "hinge"}, "loss_type='hinge' is not supported; choose one of cross_entropy"),
        ({"reduction": "none"}, "reduction='none' is not supported"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not supported"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"z_loss_coefficient": -1.0}, "z_loss_coefficient must not be negative"),
    ],
)
def test_loss_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_loss_config_is_a_static_argument():
    from easydel.infra import LossConfig as FromInfra

    assert FromInfra is LossConfig
    assert hash(LossConfig(label_smoothing=0.1)) == hash(LossConfig(label_smoothing=0.1))
    assert LossConfig(label_smoothing=0.1) != LossConfig()
    with pytest.raises(AttributeError):
        LossConfig().label_smoothing = 0.5
