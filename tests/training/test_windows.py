"""Windows of text, and perplexity on a tiny model."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.training import WindowedText, measure_perplexity
from easydel.training.data import IGNORED

CONFIG = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip


def numbered(count: int, length: int) -> WindowedText:
    return WindowedText(np.arange(1, count + 1, dtype=np.int32), length, begin_id=0)


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**CONFIG), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("count", "length"), [(8, 8), (9, 8), (16, 8), (17, 8), (100, 8), (5, 2)])
def test_windows_are_runs_of_the_text_after_a_begin_token(count, length):
    text = numbered(count, length)
    for step in range(30):
        batch = text.train_batch(step, batch_size=3)["input_ids"]
        assert batch.shape == (3, length)
        assert (batch[:, 0] == 0).all()
        assert (np.diff(batch[:, 1:]) == 1).all()
        assert batch.max() <= count


def test_a_pass_sees_each_window_once_and_the_next_in_another_order():
    text = numbered(200, 8)
    per_pass = text.windows_per_epoch
    firsts = [int(text.train_batch(step, 1)["input_ids"][0, 1]) for step in range(2 * per_pass)]
    assert len(set(firsts[:per_pass])) == per_pass
    assert np.argsort(firsts[:per_pass]).tolist() != np.argsort(firsts[per_pass:]).tolist()
    assert per_pass * 7 > 200 - 2 * 8  # hardly anything is left out


def test_batches_depend_on_step_and_seed_alone():
    text = numbered(300, 8)
    assert (text.train_batch(5, 4, 1)["input_ids"] == numbered(300, 8).train_batch(5, 4, 1)["input_ids"]).all()
    assert (text.train_batch(5, 4, 1)["input_ids"] != text.train_batch(5, 4, 2)["input_ids"]).any()


@pytest.mark.parametrize("count", [8, 21, 22, 30])
def test_evaluation_labels_each_token_once(count):
    batches = list(numbered(count, 8).eval_batches(2))
    labels = np.concatenate([batch["labels"].ravel() for batch in batches])
    assert labels[labels != IGNORED].tolist() == list(range(1, count + 1))
    assert {batch["input_ids"].shape for batch in batches} == {(2, 8)}


def test_a_text_without_a_window_is_refused():
    with pytest.raises(ValueError, match="4 tokens gives no window of 8"):
        numbered(4, 8)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(model):
    model.merge_params_dict(jax.tree.map(np.zeros_like, model.params))
    measured = measure_perplexity(model, numbered(30, 8).eval_batches(4))
    assert measured.tokens == 30
    assert measured.per_token == pytest.approx(32, rel=1e-6)
    assert measured.bits_per_byte(60) == pytest.approx(30 * 5 / 60, rel=1e-6)


def test_perplexity_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="at least one label"):
        measure_perplexity(model, [])
