"""What heads on an encoder do beyond the table: pooling, places of answers, dropout before a classifier, no text."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import easydel
from easydel.hub.weight_map import WeightRule
from easydel.models.llama import LlamaModel
from easydel.models.tasks import TokenClassifier
from easydel.models.tasks.embedding import normalize, pool
from tests.models.inputs import as_torch, int32, pad
from tests.models.pairs import Jitted, Pair, close, pair
from tests.models.table import FAMILIES


def bert(task: str, **fields: Any) -> Pair:
    return pair("bert", "tied", task, **{"num_hidden_layers": 1, **fields})  # what is proved here, one layer shows


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", True)])
def test_embeddings_are_pooled_from_transformers_hidden_states(pooling: str, normalize: bool) -> None:
    case = bert("embedding")
    cls = type(case.ours)
    model = cls.from_pretrained(case.folder, embedding_pooling=pooling, embedding_normalize=normalize)
    rows = case.rows((9, 4, 6))
    (left, left_mask), (right, right_mask) = (pad(rows, 9, left=side) for side in (True, False))
    ids, mask = np.concatenate([left, right]), np.concatenate([left_mask, right_mask])
    got = Jitted(model)(input_ids=ids, attention_mask=mask).embeddings
    for index, row in enumerate([*rows, *rows]):
        hidden = case.theirs(input_ids=row[None]).last_hidden_state[0]
        want = {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        want = torch.nn.functional.normalize(want, dim=-1) if normalize else want
        close(got[index], want, 1e-4, f"row {index}")


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_pooling_leaves_padding_out(how: str) -> None:
    hidden = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    got = pool(hidden, mask, how)
    for row, kept in enumerate(mask[:3]):
        tokens = hidden[row][kept].astype(np.float64)
        want = {"mean": tokens.mean(axis=0), "cls": tokens[0], "last": tokens[-1]}[how]
        np.testing.assert_allclose(got[row], want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got[3], 0)  # a row without tokens: zeros, not NaN
    np.testing.assert_allclose(pool(hidden[:1], None, how), got[:1], rtol=1e-6)


def test_normalizing_zeros_has_a_finite_gradient() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(normalize(vectors), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: normalize(x).sum())(vectors)).all()


def test_pooling_is_kept_in_the_config(tmp_path: Any) -> None:
    case = bert("embedding")
    cls = type(case.ours)
    cls.from_pretrained(case.folder, embedding_pooling="last", embedding_normalize=False).save_pretrained(tmp_path)
    config = easydel.AutoEasyDeLModelForEmbedding.from_pretrained(tmp_path).config
    assert (config.embedding_pooling, config.embedding_normalize) == ("last", False)
    with pytest.raises(easydel.UnsupportedError, match="embedding_pooling='max'"):
        cls.from_pretrained(case.folder, embedding_pooling="max")


def test_the_pooler_sees_the_first_token_wherever_it_stands() -> None:
    case = bert("base")
    rows = case.rows((9, 4, 6))
    right, left = (case.run(**case.inputs(*pad(rows, 9, left=side))).pooler_output for side in (False, True))
    for index, row in enumerate(rows):
        want = case.theirs(input_ids=row[None]).pooler_output[0]
        close(right[index], want, 1e-4, f"row {index}, padded right")
        close(left[index], want, 1e-4, f"row {index}, padded left")


def test_pairs_of_sequences_are_told_apart_by_their_types() -> None:
    case = bert("masked-lm")
    ids, types = case.ids(2, 11), np.repeat(int32([[0] * 5 + [1] * 6]), 2, axis=0)
    want = case.theirs(input_ids=ids, token_type_ids=types).logits
    close(case.run(input_ids=ids, token_type_ids=types).logits, want, 1e-4)
    assert (case.theirs(input_ids=ids).logits - want).abs().max() > 1e-2, "types have no effect"


@pytest.mark.parametrize(
    ("labels", "problem", "targets"),
    [
        (1, None, np.array([0.5, -1.0, 2.0], np.float32)),
        (3, None, np.array([2, 0, 1], np.int32)),
        (3, "regression", np.arange(9, dtype=np.float32).reshape(3, 3)),
        (3, "multi_label_classification", np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], np.float32)),
    ],
)
def test_losses_of_the_pooled_classifier(labels: int, problem: str | None, targets: np.ndarray) -> None:
    names = {str(index): f"L{index}" for index in range(labels)}
    ids = {name: int(index) for index, name in names.items()}
    case = bert("sequence-classification", id2label=names, label2id=ids, problem_type=problem)
    given = case.inputs(*pad(case.rows((9, 4, 6)), 9, left=False)) | {"labels": targets}
    case.hf.config.problem_type = problem  # transformers writes its guess into the config
    close(case.run(**given).loss, case.hf(**as_torch(given)).loss, 1e-5)


@pytest.mark.parametrize(
    ("starts", "ends"),
    [([0, 3, 8], [2, 3, 8]), ([0, 9, 8], [2, 40, 8]), ([[1], [2], [3]], [[4], [5], [6]]), ([-1, 3, -100], [0, 3, 4])],
    ids=["inside", "cut off", "columns", "negative"],
)
def test_places_of_answers(starts: Any, ends: Any) -> None:
    case = bert("question-answering")
    places = {"start_positions": np.asarray(starts, np.int32), "end_positions": np.asarray(ends, np.int32)}
    inputs = case.inputs(case.ids(3, 9))
    want = case.theirs(**inputs, **places)
    out = case.run(**inputs, **places)
    close(out.loss, want.loss, 1e-5)
    labels = np.stack([places[name].reshape(-1) for name in places], axis=-1)
    loss, metrics = case.ours.compute_loss(labels=labels, **inputs)
    close(loss, want.loss, 1e-5, "compute_loss")
    assert 0 <= float(metrics["accuracy"]) <= 1


def test_what_question_answering_refuses() -> None:
    case = bert("question-answering")
    with pytest.raises(ValueError, match="both start_positions and end_positions"):
        case.ours(input_ids=int32([[5, 6]]), start_positions=int32([0]))
    config = type(case.ours.config)(**FAMILIES["bert"].config, num_labels=3)
    with pytest.raises(ValueError, match="num_labels=2"):
        type(case.ours)(config)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("field", ["classifier_dropout", "hidden_dropout_prob"])
def test_dropout_before_a_classifier(task: str, field: str) -> None:
    """With a classifier of ones on features that are not dropped otherwise, what is missing was dropped there."""
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 0}
    case = bert(task, **(others | {field: 0.5}))
    pure, params, inputs = case.ours.pure_transform_fn(), case.ours.params, case.inputs(case.ids(2, 9))
    close(pure(params, inputs).logits, case.theirs(**inputs).logits, 1e-4)
    one, same, other = (pure(params, inputs, rngs=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 1e-2


class LlamaForTokenClassification(TokenClassifier):
    backbone_class = LlamaModel
    config_class = easydel.LlamaConfig
    model_task = "token-classification"
    weight_map = (WeightRule("score", "classifier", None),)


def test_tokens_are_classified_on_a_decoder_too(tmp_path: Any) -> None:
    config = transformers.LlamaConfig(**FAMILIES["llama"].config, num_labels=3)
    theirs = transformers.LlamaForTokenClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = LlamaForTokenClassification.from_pretrained(tmp_path)
    ids = np.arange(4, 24, dtype=np.int32).reshape(2, 10)
    given = {"input_ids": ids, "labels": np.where(ids % 5 == 0, -100, ids % 3)}
    with torch.no_grad():
        want = theirs(**as_torch(given))
    got = Jitted(ours)(**given)
    close(got.logits, want.logits, 1e-4)
    close(got.loss, want.loss, 1e-5)
    cached = ours(input_ids=int32(ids), cache=ours.init_operations_cache(2, 12))
    close(cached.logits, got.logits, 1e-5)
    assert int(cached.cache.index) == 10


@pytest.mark.parametrize("task", FAMILIES["bert"].theirs)
def test_an_encoder_writes_nothing_and_keeps_no_cache(task: str) -> None:
    case = bert(task)
    with pytest.raises(easydel.UnsupportedError, match=rf"generate\(\) is not supported by Bert\w+ \({task}\)"):
        case.ours.generate(int32([[5, 6]]), max_new_tokens=2)
    assert case.ours.init_operations_cache(1, 4).layers == ()
    assert not case.ours.takes_cache


def test_sequences_longer_than_the_positions_are_refused() -> None:
    case = bert("masked-lm")
    with pytest.raises(ValueError, match="has 64 positions; 65 tokens do not fit"):
        case.ours(input_ids=int32(case.ids(1, 65)))
    with pytest.raises(ValueError, match="has 64 positions; 65 tokens do not fit"):
        case.ours.prepare_inputs_for_call(**case.inputs(case.ids(2, 65), np.ones((2, 65), np.int32)))
    ids, mask = pad(case.rows((5,)), 80, left=False)  # padding may stand beyond them
    inputs = case.ours.prepare_inputs_for_call(**case.inputs(ids, mask))
    assert np.isfinite(case.run(**inputs).logits).all()


def test_flops_are_the_formula() -> None:
    config, batch, length = bert("masked-lm").ours.config, 2, 16
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = 4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden
    expected = 2 * batch * length * (config.num_hidden_layers * layer + hidden * hidden + hidden * vocab)
    assert bert("masked-lm").ours._flop(config, batch, length) == expected
