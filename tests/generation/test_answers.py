"""Several answers, own functions, time limits, padding: what transformers' tokens alone do not show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import CompilationCounter
from easydel.generation import engine, streaming
from easydel.generation.recompute import RecomputeLoop
from tests.generation.tiny import VOCAB, forgetful, llama

NEW = 10


def prompt(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def answers(ids: Any, **options: Any) -> np.ndarray:
    return np.asarray(llama().generate(ids, **{"max_new_tokens": NEW} | options).sequences)


EVERYTHING = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[3], [4, 5]],
    "min_new_tokens": 4,
    "eos_token_id": [7, 9],
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.2,
    "exponential_decay_length_penalty": (3, 1.2),
    "begin_suppress_tokens": [1],
    "forced_eos_token_id": 7,
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EVERYTHING, id="greedy", marks=pytest.mark.slow),
        pytest.param(EVERYTHING | {"temperature": 1.2, "min_p": 0.02}, id="sampled", marks=pytest.mark.slow),
        pytest.param(EVERYTHING | {"num_beams": 3}, id="beams"),
    ],
)
def test_padded_rows_equal_the_same_rows_alone(options: dict[str, Any]) -> None:
    rows = [prompt(1, length, seed=length)[0] for length in (9, 4, 6)]
    ids, mask = np.full((3, 9), 5), np.zeros((3, 9), int)
    for index, row in enumerate(rows):
        ids[index, 9 - len(row) :], mask[index, 9 - len(row) :] = row, 1
    together = answers(ids, attention_mask=mask, pad_token_id=0, **options)[:, 9:]
    assert len(np.unique(together, axis=0)) == 3
    # Draws come from a key for each row: of rows alone only the first has the same.
    for index, row in enumerate(rows if "temperature" not in options else rows[:1]):
        alone = answers(row[None].repeat(3, 0), pad_token_id=0, **options)[0, len(row) :]  # so many: the same program
        np.testing.assert_array_equal(together[index, : len(alone)], alone)
        assert (together[index, len(alone) :] == 0).all()


def test_several_answers_are_drawn_independently() -> None:
    options = {"temperature": 1.5, "num_return_sequences": 3}
    ids = prompt(2, 5)
    out = answers(ids, **options)
    assert out.shape == (6, 5 + NEW)
    np.testing.assert_array_equal(out[:, :5], ids.repeat(3, 0))
    assert len(np.unique(out, axis=0)) == 6
    np.testing.assert_array_equal(out, answers(ids.repeat(3, 0), temperature=1.5), "as if the prompts were repeated")
    steps = list(llama().stream(ids, max_new_tokens=NEW, **options))
    np.testing.assert_array_equal(np.stack(steps, axis=1), out[:, 5:])


def test_beams_are_drawn_without_replacement_from_the_exact_distribution() -> None:
    """Two candidates (of 24) for each of many equal prompts: their frequencies follow the formula of such draws."""
    prompts, width = 3000, 2
    ids = np.repeat(prompt(1, 5), prompts, axis=0)
    options = {"num_beams": width, "num_return_sequences": width, "do_sample": True, "max_new_tokens": 1}
    out = llama().generate(ids, **options, temperature=1.3, output_logits=True, output_scores=True)
    pairs = np.asarray(out.sequences)[:, 5].reshape(prompts, width)
    logits = np.asarray(out.logits[0][0], np.float64)
    # transformers divides logarithms of probabilities by the temperature and then draws from what that gives.
    scores = (logits - np.log(np.exp(logits).sum())) / 1.3
    np.testing.assert_allclose(out.scores[0][0], scores, atol=1e-5)  # rounding of float32
    p = np.exp(scores) / np.exp(scores).sum()
    # Four candidates are drawn, and of them the two likeliest are kept: P(both of a set of four).
    expected = np.zeros((VOCAB, VOCAB))
    order = np.argsort(-p)
    rank = np.argsort(order)
    generator = np.random.default_rng(0)
    drawn = np.argsort(-(scores + generator.gumbel(size=(400_000, VOCAB))), axis=1)[:, : 2 * width]
    best = np.sort(rank[drawn], axis=1)[:, :width]
    np.add.at(expected, (order[best[:, 0]], order[best[:, 1]]), 1 / len(drawn))
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    cells = expected * prompts >= 5
    assert cells.sum() > 5
    statistic = ((counts - prompts * expected)[cells] ** 2 / (prompts * expected[cells])).sum()
    freedom = cells.sum() - 1
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom) + 4, (statistic, freedom)


def test_beam_sampling_follows_the_seed_and_rows_their_keys() -> None:
    options = {"num_beams": 2, "do_sample": True, "temperature": 1.4}
    ids = prompt(2, 5)
    one, same, other = (answers(ids, seed=seed, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    other = answers(np.stack([ids[0], ids[1, ::-1]]), seed=1, **options)
    np.testing.assert_array_equal(other[0], one[0])
    assert (other[1, 5:] != one[1, 5:]).any()


def test_more_ends_than_a_vocabulary_has_continuations_are_refused() -> None:
    with pytest.raises(ValueError, match="num_beams=2 looks at 56 continuations"):
        answers(prompt(1, 5), num_beams=2, eos_token_id=[*range(VOCAB), 24, 25, 26])


def only_even(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(scores.shape[1]) % 2 == 0, scores, -jnp.inf)


def not_the_last(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(scores.shape[1]) == input_ids[:, -1:], -jnp.inf, scores)


def has_seven_tokens(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
    return (input_ids >= 0).sum(axis=1) >= 7


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_own_functions(beams: int) -> None:
    ids, mask = prompt(2, 5), np.array([[1] * 5, [0, 0, 1, 1, 1]])
    out = answers(ids, attention_mask=mask, logits_processor=[only_even, not_the_last], num_beams=beams)
    new = out[:, 5:]
    assert (new % 2 == 0).all()
    assert (out[:, 5:] != out[:, 4:-1]).all()
    out = answers(ids, attention_mask=mask, stopping_criteria=[has_seven_tokens], num_beams=beams, pad_token_id=23)
    assert out.shape == (2, 5 + 4), "a row of three tokens gets four, one of five gets two"
    assert (out[0, 7:] == 23).all()


def test_own_functions_are_compiled_once() -> None:
    ids = prompt(1, 5)
    answers(ids, logits_processor=[only_even])
    with CompilationCounter() as counter:
        answers(ids, logits_processor=[only_even])
    assert counter.count == 0


def test_own_functions_that_give_another_shape_are_named() -> None:
    def short(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
        return scores[:, 1:]

    with pytest.raises(
        ValueError, match=r"logits_processor short must return scores of shape \(1, 24\), got \(1, 23\)"
    ):
        answers(prompt(1, 5), logits_processor=[short])
    with pytest.raises(ValueError, match=r"stopping_criteria short must return bool \[1\]"):
        answers(prompt(1, 5), stopping_criteria=[short])


def test_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(1000))
    for module in (engine, streaming):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    free = answers(prompt(1, 5))
    # The clock is read at the start and before each token: 1, 2, 3 and 4 seconds later.
    np.testing.assert_array_equal(answers(prompt(1, 5), max_time=3.5), free[:, : 5 + 4])
    beams = answers(prompt(1, 5), max_time=3.5, num_beams=2)
    assert beams.shape == (1, 5 + 4)
    np.testing.assert_array_equal(beams, answers(prompt(1, 5), max_new_tokens=4, num_beams=2))
    assert answers(prompt(1, 5), max_time=1e6).shape == (1, 5 + NEW)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"output_scores": True}])
def test_streams_refuse_what_is_not_settled(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"stream.*{next(iter(options))}"):
        llama().stream(prompt(1, 3), **options)


def test_changing_numbers_compiles_nothing() -> None:
    ids = prompt(1, 5)
    first = {
        "num_beams": 2, "length_penalty": 0.5, "repetition_penalty": 1.2, "presence_penalty": 0.2, "eos_token_id": 3,
        "bad_words_ids": [[1, 2]], "suppress_tokens": [4], "sequence_bias": {(3, 4): 1.0}, "min_new_tokens": 2,
        "forced_eos_token_id": 5, "temperature": 1.1, "top_k": 9, "typical_p": 0.9, "eta_cutoff": 0.01,
    }  # fmt: skip
    second = {
        "num_beams": 2, "length_penalty": 1.5, "repetition_penalty": 0.8, "frequency_penalty": 0.3, "eos_token_id": 6,
        "bad_words_ids": [[6, 2], [8]], "suppress_tokens": [4, 9, 11], "sequence_bias": {(3, 9): 1.0, (4,): 2.0},
        "min_new_tokens": 3, "forced_eos_token_id": [5, 6], "temperature": 0.9, "top_k": 12, "typical_p": 0.8,
        "eta_cutoff": 0.02, "max_new_tokens": 7,
    }  # fmt: skip
    answers(ids, **first)
    with CompilationCounter() as counter:
        answers(ids, **second)
    assert counter.count == 0


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 3, "repetition_penalty": 1.3}
OWN = {"num_beams": 2, "stopping_criteria": [has_seven_tokens], "logits_processor": [not_the_last]}
MANY = EVERYTHING | {"temperature": 1.2, "num_return_sequences": 2}


@pytest.mark.parametrize(
    "exactly",
    [pytest.param(False, id="at once"), pytest.param(True, id="length by length", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(BEAMS, id="beams"),
        pytest.param(OWN, id="own", marks=pytest.mark.slow),
        pytest.param(MANY, id="many", marks=pytest.mark.slow),
    ],
)
def test_without_a_cache_it_is_the_same(
    options: dict[str, Any], exactly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(2, 5)
    options = options | {"max_new_tokens": 5}
    if exactly:  # as for a model whose results padding changes
        monkeypatch.setattr(RecomputeLoop, "padding_is_unseen", lambda *_: False)
    want = llama().generate(ids, output_scores=True, **options)
    with pytest.warns(UserWarning, match="takes no cache"):
        got = forgetful().generate(ids, output_scores=True, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assert got.keys() == want.keys()
    # Rounding of float32 logits, whose size is about 10.
    np.testing.assert_allclose(np.stack(got.scores), np.stack(want.scores), atol=1e-4)
