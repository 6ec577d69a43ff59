"""What a `LossConfig` refuses, by itself and for the tasks that do not read a field."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LossConfig, UnsupportedError
from easydel.loss import task_loss

WRONG = [
    ({"loss_type": "hinge"}, "loss_type='hinge' is not supported; choose one of cross_entropy"),
    ({"reduction": "median"}, "reduction='median' is not supported; choose one of mean, sum, none"),
    ({"problem_type": "ranking"}, "problem_type='ranking' is not supported"),
    ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ({"label_smoothing": -0.1}, "label_smoothing must be in"),
    ({"label_smoothing": float("nan")}, "label_smoothing must be in"),
    ({"label_smoothing": "0.1"}, "label_smoothing must be in"),
    ({"z_loss_coefficient": -1.0}, "z_loss_coefficient must not be negative"),
    ({"z_loss_coefficient": None}, "z_loss_coefficient must not be negative but a finite number, got None"),
    ({"auxiliary_loss_coefficient": float("inf")}, "auxiliary_loss_coefficient must not be negative"),
    ({"router_z_loss_coefficient": -0.1}, "router_z_loss_coefficient must not be negative"),
    ({"ignore_index": 1.5}, "ignore_index must be an integer, got 1.5"),
    ({"loss_normalizing_factor": 0}, "loss_normalizing_factor must be a positive number, got 0"),
    ({"loss_normalizing_factor": True}, "loss_normalizing_factor must be a positive number"),
    ({"loss_normalizing_factor": 3.0, "reduction": "sum"}, "leave one of them out"),
    ({"num_labels": 0}, "num_labels must be a positive integer, got 0"),
    ({"shift_tokens": 1}, "shift_tokens must be True, False or None, got 1"),
    ({"token_chunk_size": 0}, "token_chunk_size must be a positive number of tokens, 'auto' or None, got 0"),
    ({"token_chunk_size": "all"}, "token_chunk_size must be a positive number"),
    ({"token_chunk_size": 2.0}, "token_chunk_size must be a positive number"),
    ({"token_chunk_size": 8, "reduction": "none"}, "reduction='none' with token_chunk_size=8 is not supported"),
    ({"compute_dtype": "int8"}, "compute_dtype='int8' is not supported; choose one of float32, bfloat16"),
    ({"compute_dtype": "floaty"}, "compute_dtype='floaty' is not supported"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=str)
def test_values_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_a_field_that_there_is_not_raises():
    with pytest.raises(TypeError, match="label_smooting"):
        LossConfig(label_smooting=0.1)


def test_a_config_comes_of_a_mapping():
    fields = {"label_smoothing": 0.1, "token_chunk_size": "auto", "compute_dtype": "bfloat16"}
    assert LossConfig.from_dict(fields) == LossConfig(**fields)
    assert LossConfig.from_dict(dataclasses.asdict(LossConfig(**fields))) == LossConfig(**fields)
    with pytest.raises(ValueError, match="no field 'label_smooting'; did you mean 'label_smoothing'"):
        LossConfig.from_dict({"label_smooting": 0.1})
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        LossConfig.from_dict({"label_smoothing": 2})


def test_a_config_is_a_static_argument():
    from easydel.infra import LossConfig as FromInfra

    assert FromInfra is LossConfig
    assert hash(LossConfig(label_smoothing=0.1)) == hash(LossConfig(label_smoothing=0.1))
    assert LossConfig(label_smoothing=0.1) != LossConfig()
    assert hash(LossConfig(compute_dtype=jnp.bfloat16)) == hash(LossConfig(compute_dtype="bfloat16"))
    with pytest.raises(AttributeError):
        LossConfig().label_smoothing = 0.5


LOGITS = np.zeros((2, 4, 3), np.float32)
TOKENS = np.zeros((2, 4), np.int32)
SPANS = (np.zeros((2, 4, 2), np.float32), np.zeros((2, 2), np.int32))
CLASSES = (np.zeros((2, 3), np.float32), np.zeros(2, np.int32))
TARGETS = (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
FLOATS = {"problem_type": "regression"}
BOTH = {"problem_type": "multi_label_classification"}
APART = [
    ("sequence-classification", CLASSES, {"shift_tokens": True}, "shift_tokens=True"),
    ("token-classification", (LOGITS, TOKENS), {"shift_tokens": False}, "shift_tokens=False"),
    ("question-answering", SPANS, {"shift_tokens": True}, "shift_tokens=True"),
    ("question-answering", SPANS, {"num_labels": 2}, "num_labels=2"),
    ("causal-lm", (LOGITS, TOKENS), {"num_labels": 3}, "num_labels=3"),
    ("causal-lm", (LOGITS, TOKENS), {"problem_type": "regression"}, "problem_type='regression'"),
    ("token-classification", (LOGITS, TOKENS), {"problem_type": "regression"}, "problem_type='regression'"),
    ("token-classification", (LOGITS, TOKENS), {"token_chunk_size": 8}, "token_chunk_size=8"),
    ("question-answering", SPANS, {"token_chunk_size": "auto"}, "token_chunk_size='auto'"),
    ("sequence-classification", TARGETS, {"label_smoothing": 0.1} | FLOATS, "label_smoothing=0.1"),
    ("sequence-classification", TARGETS, {"z_loss_coefficient": 0.1} | BOTH, "z_loss_coefficient=0.1"),
    ("sequence-classification", TARGETS, {"ignore_index": -1} | BOTH, "ignore_index=-1"),
]


@pytest.mark.parametrize(("task", "given", "fields", "named"), APART)
def test_a_field_that_does_not_apply_raises_naming_it_and_the_task(task, given, fields, named):
    about = fields.get("problem_type", task) if task == "sequence-classification" else task
    with pytest.raises(ValueError, match=f"{named} of the LossConfig does not apply to .*{about}"):
        task_loss(task, *given, LossConfig(**fields))


def test_num_labels_is_compared_with_the_logits():
    for task, given in (("sequence-classification", CLASSES), ("token-classification", (LOGITS, TOKENS))):
        assert task_loss(task, *given, LossConfig(num_labels=3))[0] > 0
        with pytest.raises(ValueError, match=r"num_labels=4 of the LossConfig contradicts logits of shape .* have 3"):
            task_loss(task, *given, LossConfig(num_labels=4))


def test_experts_losses_need_experts_or_a_scalar():
    with pytest.raises(ValueError, match=r"router_z_loss_coefficient=0.1 of the LossConfig needs what routers said"):
        task_loss("causal-lm", LOGITS, TOKENS, LossConfig(router_z_loss_coefficient=0.1))
    one = jnp.float32(1)
    with pytest.raises(UnsupportedError, match=r"reduction='none' with auxiliary_loss of weight 0.5"):
        task_loss(
            "causal-lm",
            LOGITS,
            TOKENS,
            LossConfig(auxiliary_loss_coefficient=0.5, reduction="none"),
            auxiliary_loss=one,
        )
    off = LossConfig(auxiliary_loss_coefficient=0.0, reduction="none")
    losses, metrics = task_loss("causal-lm", LOGITS, TOKENS, off, auxiliary_loss=one)
    assert losses.shape == (2, 4)
    assert metrics["auxiliary_loss"] == 1
    # The contract's own page gives it to any model: without experts there is nothing to weigh.
    loss, metrics = task_loss("causal-lm", LOGITS, TOKENS, LossConfig(auxiliary_loss_coefficient=0.001))
    assert loss == task_loss("causal-lm", LOGITS, TOKENS)[0]
    assert "auxiliary_loss" not in metrics
