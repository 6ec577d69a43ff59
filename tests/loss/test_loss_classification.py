"""Sequence classification: three problem types, as transformers defines and chooses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import LlamaConfig, LlamaForSequenceClassification, LossConfig
from easydel.loss import task_loss

RNG = np.random.default_rng(1)
TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
CLASSES = np.asarray([2, 0, 1])
CASES = {
    "single": (3, CLASSES, None),
    "single_named": (3, CLASSES, "single_label_classification"),
    "single_ignored": (3, np.asarray([2, -100, 1]), None),
    "multi": (3, RNG.integers(0, 2, (3, 3)).astype(np.float32), None),
    "multi_named": (3, RNG.random((3, 3)).astype(np.float32), "multi_label_classification"),
    "regression": (1, RNG.normal(size=3).astype(np.float32), None),
    "regression_column": (1, RNG.normal(size=(3, 1)).astype(np.float32), "regression"),
    "regression_of_three": (3, RNG.normal(size=(3, 3)).astype(np.float32), "regression"),
}


def torch_loss(logits, labels, num_labels, problem_type):
    """Return transformers' own loss (which chooses a problem type where none is given)."""
    import torch
    import transformers
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    config = transformers.LlamaConfig(num_labels=num_labels, problem_type=problem_type)
    tensor = torch.tensor(labels)
    return ForSequenceClassificationLoss(tensor, torch.tensor(logits), config).item()


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_transformers(name):
    num_labels, labels, problem_type = CASES[name]
    logits = RNG.normal(size=(3, num_labels)).astype(np.float32) * 2
    shaped = labels.reshape(-1) if name == "regression_column" else labels
    expected = torch_loss(logits, shaped, num_labels, problem_type)
    config = LlamaConfig(**TINY, num_labels=num_labels, problem_type=problem_type)
    loss, metrics = task_loss("sequence-classification", logits, labels, None, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert loss.dtype == jnp.float32
    assert metrics["loss"] == loss
    assert metrics["num_tokens"] == (2 if name == "single_ignored" else 3)
    assert ("accuracy" in metrics) == name.startswith("single")


def test_the_loss_config_decides_over_the_model_config():
    config = LlamaConfig(**TINY, num_labels=3, problem_type="multi_label_classification")
    logits = RNG.normal(size=(3, 3)).astype(np.float32)
    asked = LossConfig(problem_type="single_label_classification")
    loss, _ = task_loss("sequence-classification", logits, CLASSES, asked, config)
    np.testing.assert_allclose(loss, torch_loss(logits, CLASSES, 3, "single_label_classification"), rtol=1e-5)


def test_sum_adds_what_mean_averages():
    logits, labels = RNG.normal(size=(3, 3)).astype(np.float32), RNG.random((3, 3)).astype(np.float32)
    total, _ = task_loss("sequence-classification", logits, labels, LossConfig(reduction="sum"))
    mean, _ = task_loss("sequence-classification", logits, labels)
    np.testing.assert_allclose(total, 9 * mean, rtol=1e-6)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_reductions_of_targets(kind):
    logits, targets = RNG.normal(size=(4, 3)).astype(np.float32), RNG.random((4, 3)).astype(np.float32)
    mean, metrics = task_loss("sequence-classification", logits, targets, LossConfig(problem_type=kind))
    each, same = task_loss("sequence-classification", logits, targets, LossConfig(problem_type=kind, reduction="none"))
    assert each.shape == targets.shape
    assert same["loss"] == mean
    np.testing.assert_allclose(each.mean(), mean, rtol=1e-6)
    factor = LossConfig(problem_type=kind, loss_normalizing_factor=8.0)
    np.testing.assert_allclose(
        task_loss("sequence-classification", logits, targets, factor)[0], each.sum() / 8, rtol=1e-6
    )
    parts = [
        task_loss("sequence-classification", logits[s], targets[s], LossConfig(problem_type=kind))
        for s in (slice(0, 1), slice(1, 4))
    ]
    combined = sum(m["num_tokens"] * loss for loss, m in parts) / metrics["num_tokens"]
    np.testing.assert_allclose(combined, mean, rtol=1e-6)


@pytest.mark.parametrize("name", ["single", "multi", "regression"])
def test_a_padded_classifier_has_the_logits_and_loss_of_transformers(name):
    import torch
    import transformers

    num_labels, labels, _ = CASES[name]
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=num_labels), rngs=nnx.Rngs(0))
    theirs = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, num_labels=num_labels)).eval()
    theirs.load_state_dict(model.to_torch(), strict=True)
    ids = RNG.integers(1, 16, (3, 6))
    ids[1, 4:] = ids[2, 2:] = 0
    mask = (ids != 0).astype(np.int32)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels))
    out = jax.jit(model.__call__)(input_ids=ids, attention_mask=mask, labels=labels)
    np.testing.assert_allclose(out.logits, expected.logits.numpy(), atol=1e-6)
    np.testing.assert_allclose(out.loss, expected.loss.item(), rtol=1e-5)
    assert model.model_task == "sequence-classification"
