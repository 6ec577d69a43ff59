"""Losses and their gradients by the logits: those of transformers' own loss functions, for every task."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.loss import loss_utils

from easydel import LossConfig
from easydel.loss import task_loss

RNG = np.random.default_rng(7)
BATCH, LENGTH, CLASSES = 4, 9, 17
LOGITS = RNG.normal(size=(BATCH, LENGTH, CLASSES)).astype(np.float32) * 3
LABELS = RNG.integers(0, CLASSES, (BATCH, LENGTH))
LABELS[0, :2] = LABELS[1, 5:] = LABELS[2, 3] = LABELS[3, -1] = -100  # padding on both sides, and holes
POOLED = LOGITS[:, 0]
TARGETS = RNG.random((BATCH, CLASSES)).astype(np.float32)
PLACES = np.asarray([[0, 3], [4, 4], [2, 9], [-1, 8]])  # one beyond the sequence, one before it


def classified(problem):
    def loss(logits, labels):
        config = SimpleNamespace(problem_type=problem, num_labels=logits.shape[-1])
        return loss_utils.ForSequenceClassificationLoss(labels, logits, config)

    return loss


def marked(logits, places):
    return loss_utils.ForQuestionAnsweringLoss(*logits.unbind(-1), *places.unbind(-1))


def written(logits, labels):  # as T5ForConditionalGeneration computes it
    return torch.nn.CrossEntropyLoss(ignore_index=-100)(logits.view(-1, CLASSES), labels.view(-1))


CASES = {
    "causal-lm": (LOGITS, LABELS, lambda x, y: loss_utils.ForCausalLMLoss(x, y, CLASSES)),
    "masked-lm": (LOGITS, LABELS, lambda x, y: loss_utils.ForMaskedLMLoss(x, y, CLASSES)),
    "seq2seq": (LOGITS, LABELS, written),
    "token-classification": (
        LOGITS,
        LABELS,
        lambda x, y: loss_utils.ForTokenClassification(x, y, SimpleNamespace(num_labels=CLASSES)),
    ),
    "question-answering": (LOGITS[..., :2], PLACES, marked),
    "sequence-classification": (POOLED, np.asarray([3, -100, 0, 16]), classified(None)),
    "single_label_classification": (POOLED, np.asarray([3, 5, 0, 16]), classified("single_label_classification")),
    "multi_label_classification": (POOLED, TARGETS.round(), classified("multi_label_classification")),
    "regression": (POOLED, TARGETS, classified("regression")),
    "regression_of_one": (POOLED[:, :1], TARGETS[:, 0], classified("regression")),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name):
    logits, labels, reference = CASES[name]
    theirs = torch.tensor(logits, requires_grad=True)
    expected = reference(theirs, torch.tensor(labels))
    expected.backward()
    problem = name.removesuffix("_of_one")
    known = problem in ("single_label_classification", "multi_label_classification", "regression")
    config = LossConfig(problem_type=problem) if known else LossConfig()
    task = "sequence-classification" if known else name
    given = jnp.asarray(logits)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: task_loss(task, x, jnp.asarray(labels), config)[0]))(given)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)  # float32
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)
    assert np.abs(theirs.grad.numpy()).max() > 1e-3
