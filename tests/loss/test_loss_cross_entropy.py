"""Cross-entropy against float64 formulas and torch."""

from __future__ import annotations

import functools

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


def reference(logits, labels, smoothing=0.0, z=0.0, reduction="mean", ignore=-100, factor=None):
    """Return loss, z-loss and accuracy in float64, by the definition: cross-entropy with soft targets."""
    logits = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    logits, labels = logits[labels != ignore], labels[labels != ignore]
    partition = np.log(np.exp(logits).sum(-1))
    soft = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
    losses = -(soft * (logits - partition[:, None])).sum(-1)
    divisor = factor or (len(labels) if reduction == "mean" else 1)

    def reduce(values):
        return values.sum() / divisor

    return reduce(losses) + reduce(z * partition**2), reduce(z * partition**2), (logits.argmax(-1) == labels).mean()


CONFIGS = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"z_loss_coefficient": 0.01},
    {"label_smoothing": 0.3, "z_loss_coefficient": 0.1, "reduction": "sum"},
    {"ignore_index": 3},
    {"loss_normalizing_factor": 4.0, "z_loss_coefficient": 0.1},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_cross_entropy_is_the_formula(fields):
    labels = np.where(LABELS == -100, 3, LABELS) if "ignore_index" in fields else LABELS
    names = {"label_smoothing": "smoothing", "z_loss_coefficient": "z", "ignore_index": "ignore"}
    names |= {"loss_normalizing_factor": "factor"}
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


@pytest.mark.parametrize(
    ("reduction", "smoothing"),
    [("mean", 0.0), ("sum", 0.2), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("sum", 0.0), ("mean", 0.2)))],
)
def test_value_and_gradient_are_those_of_torch(smoothing, reduction):
    import torch

    theirs = torch.tensor(LOGITS, requires_grad=True)
    kinds = {"label_smoothing": smoothing, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy(theirs.reshape(-1, 11), torch.tensor(LABELS).reshape(-1), **kinds)
    expected.backward()
    config = LossConfig(**kinds)
    loss, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, LABELS, config)[0]))(LOGITS)
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


@pytest.mark.parametrize("label", [11, -99, *(pytest.param(label, marks=pytest.mark.slow) for label in (400, -1))])
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


def test_no_reduction_gives_each_token_its_loss():
    config = LossConfig(reduction="none", label_smoothing=0.1, z_loss_coefficient=0.01)
    losses, metrics = task_loss("causal-lm", LOGITS, LABELS, config)
    assert losses.shape == LABELS.shape
    assert losses.dtype == jnp.float32
    counts = np.append(LABELS[:, 1:] != -100, [[False], [False]], axis=1)
    assert ((np.asarray(losses) != 0) == counts).all()
    row, place = 0, 2
    one, _, _ = reference(LOGITS[row, place], LABELS[row, place + 1, None], 0.1, 0.01)
    np.testing.assert_allclose(losses[row, place], one, rtol=1e-6)
    mean, expected = task_loss("causal-lm", LOGITS, LABELS, LossConfig(label_smoothing=0.1, z_loss_coefficient=0.01))
    np.testing.assert_allclose(losses.sum() / counts.sum(), mean, rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("task", ["causal-lm", "base", "seq2seq", "masked-lm"])
def test_shifting_is_the_task_s_unless_the_config_says(task):
    shifted, own = (reference(*pair)[0] for pair in ((LOGITS[:, :-1], LABELS[:, 1:]), (LOGITS, LABELS)))
    want = {True: shifted, False: own, None: shifted if task in ("causal-lm", "base") else own}
    for shift, expected in want.items():
        np.testing.assert_allclose(
            task_loss(task, LOGITS, LABELS, LossConfig(shift_tokens=shift))[0], expected, rtol=1e-6
        )


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_arithmetic_in_another_dtype(dtype):
    expected, _, _ = reference(LOGITS, LABELS)
    loss, metrics = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), LossConfig(compute_dtype=dtype))
    assert loss.dtype == metrics["loss"].dtype == jnp.float32
    assert abs(float(loss) - expected) > 1e-5
    # Logits up to 10 and their log-partitions are rounded to half a unit each.
    np.testing.assert_allclose(loss, expected, atol=10 * float(jnp.finfo(dtype).eps))


def test_arithmetic_in_float64_needs_it_switched_on():
    config = LossConfig(compute_dtype="float64")
    with pytest.raises(ValueError, match=r"compute_dtype='float64' needs jax.config.update\('jax_enable_x64', True\)"):
        cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), config)
    with jax.enable_x64(True):
        loss, _ = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), config)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(LOGITS, LABELS)[0], rtol=1e-7)


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.1, "z_loss_coefficient": 0.1}], ids=["plain", "terms"])
def test_micro_batches_combine_to_one_batch(fields):
    config = LossConfig(**fields)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def value(logits, labels):
        return task_loss("causal-lm", logits, labels, config)

    run = jax.jit(value)
    (whole, _), expected = run(LOGITS, LABELS)
    parts = [run(LOGITS[i, None], LABELS[i, None]) for i in (0, 1)]
    counts = [metrics["num_tokens"] for (_, metrics), _ in parts]
    assert counts[0] != counts[1]
    total = sum(counts)
    np.testing.assert_allclose(sum(m["num_tokens"] * loss for (loss, m), _ in parts) / total, whole, rtol=1e-6)
    combined = np.concatenate([m["num_tokens"] / total * g for (_, m), g in parts])
    np.testing.assert_allclose(combined, expected, atol=1e-7)
    factor = LossConfig(**fields, loss_normalizing_factor=float(total))
    added = sum(task_loss("causal-lm", LOGITS[i, None], LABELS[i, None], factor)[0] for i in (0, 1))
    np.testing.assert_allclose(added, whole, rtol=1e-6)


def test_only_the_loss_of_the_metrics_carries_a_gradient():
    config = LossConfig(z_loss_coefficient=0.1)
    gradient = {
        name: np.abs(
            jax.grad(lambda x, name=name: cross_entropy(x, LABELS, config)[1][name])(jnp.asarray(LOGITS))
        ).max()
        for name in ("loss", "accuracy", "z_loss")
    }
    assert gradient["loss"] > 0
    assert gradient["accuracy"] == gradient["z_loss"] == 0


def test_no_label_at_all_has_no_gradient():
    labels = np.full((2, 6), -100)
    gradient = jax.grad(lambda x: task_loss("causal-lm", x, labels, LossConfig(z_loss_coefficient=0.1))[0])
    np.testing.assert_array_equal(gradient(jnp.asarray(LOGITS)), 0)
