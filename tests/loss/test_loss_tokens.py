"""Losses of single tokens and of places of answers, against torch by transformers' formulas."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LossConfig
from easydel.loss import task_loss

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(2, 6, 5)).astype(np.float32) * 3
LABELS = RNG.integers(0, 5, (2, 6))
LABELS[0, 1] = LABELS[1, 3:] = -100
SPANS = RNG.normal(size=(3, 7, 2)).astype(np.float32) * 3


@pytest.mark.parametrize("task", ["masked-lm", "token-classification"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_are_compared_with_their_own_labels(task, dtype):
    import torch

    logits = jnp.asarray(LOGITS, dtype)
    wide = torch.tensor(np.asarray(logits, np.float64))
    expected = torch.nn.functional.cross_entropy(wide.reshape(-1, 5), torch.tensor(LABELS).reshape(-1)).item()
    loss, metrics = task_loss(task, logits, LABELS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["num_tokens"] == 8
    kept = LABELS != -100
    np.testing.assert_allclose(metrics["accuracy"], (LOGITS.argmax(-1) == LABELS)[kept].mean(), rtol=1e-6)


def spans_by_torch(positions):
    """Return transformers' loss: places beyond the sequence are left out, negative ones are the first."""
    import torch

    length, total = SPANS.shape[1], 0.0
    for side in (0, 1):
        places = torch.tensor(positions[:, side]).clamp(0, length)
        logits = torch.tensor(SPANS[..., side], dtype=torch.float64)
        total += torch.nn.functional.cross_entropy(logits, places, ignore_index=length).item() / 2
    return total


@pytest.mark.parametrize(
    "positions",
    [[[0, 2], [3, 3], [6, 6]], [[0, 2], [7, 9], [6, 50]], [[-1, 2], [-100, 3], [2, 7]]],
    ids=["inside", "cut_off", "negative"],
)
def test_places_of_answers(positions):
    positions = np.asarray(positions)
    loss, metrics = task_loss("question-answering", SPANS, positions)
    np.testing.assert_allclose(loss, spans_by_torch(positions), rtol=1e-6)
    kept = positions < 7
    hits = (SPANS.argmax(axis=1) == np.maximum(positions, 0)) & kept
    assert metrics["num_tokens"] == kept.sum()
    np.testing.assert_allclose(metrics["accuracy"], hits.sum() / kept.sum(), rtol=1e-6)


def test_answers_that_are_all_cut_off_cost_nothing():
    loss, metrics = task_loss("question-answering", SPANS, np.full((3, 2), 7))
    assert loss == 0
    assert metrics["num_tokens"] == 0


def test_smoothing_applies_to_places():
    plain, _ = task_loss("question-answering", SPANS, np.zeros((3, 2), int))
    smooth, _ = task_loss("question-answering", SPANS, np.zeros((3, 2), int), LossConfig(label_smoothing=0.2))
    assert abs(float(plain) - float(smooth)) > 1e-3


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        ("masked-lm", LOGITS, LABELS[:, :-1]),
        ("token-classification", LOGITS, LABELS.astype(np.float32)),
        ("question-answering", SPANS, np.zeros(3, int)),
    ],
)
def test_labels_that_do_not_fit_are_refused(task, logits, labels):
    with pytest.raises(ValueError, match="labels"):
        task_loss(task, logits, labels)


def test_places_without_reduction_and_with_a_factor():
    places = np.asarray([[0, 2], [7, 9], [6, 50]])  # two starts count, one end
    each, metrics = task_loss("question-answering", SPANS, places, LossConfig(reduction="none"))
    assert each.shape == places.shape
    np.testing.assert_array_equal(np.asarray(each) != 0, places < 7)
    mean, expected = task_loss("question-answering", SPANS, places)
    np.testing.assert_allclose(mean, (each[:, 0].sum() / 2 + each[:, 1].sum() / 1) / 2, rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    total, _ = task_loss("question-answering", SPANS, places, LossConfig(reduction="sum"))
    factor = LossConfig(loss_normalizing_factor=5.0)
    parts = [task_loss("question-answering", SPANS[i, None], places[i, None], factor)[0] for i in range(3)]
    np.testing.assert_allclose(sum(parts), total / 5, rtol=1e-6)  # whatever is cut off where


def test_places_have_a_z_loss():
    places = np.asarray([[0, 2], [3, 3], [6, 6]])
    plain, _ = task_loss("question-answering", SPANS, places)
    loss, metrics = task_loss("question-answering", SPANS, places, LossConfig(z_loss_coefficient=0.1))
    partition = np.log(np.exp(SPANS.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(metrics["z_loss"], 0.1 * (partition**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(loss, plain + metrics["z_loss"], rtol=1e-6)
