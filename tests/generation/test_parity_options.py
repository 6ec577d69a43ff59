"""Tokens are transformers' own, option by option, with ends that really occur."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.generation.parity import TIE, ends_early, frequent, is_near_tie, ours, same, theirs
from tests.models.pairs import Pair, pair
from tests.models.table import FAMILIES, cases

WRITERS = [family for family, variant in cases("generate") if variant == FAMILIES[family].main.name]


def main(family: str) -> Pair:
    return pair(family, FAMILIES[family].main.name)


def prompts(case: Pair, seed: int = 0) -> np.ndarray:
    return case.ids(3, 6, seed)


def ends(case: Pair, ids: np.ndarray, **options: Any) -> list[int]:
    """Return end-of-text tokens that the free answers hold."""
    return frequent(theirs(case, ids, **options).sequences.numpy(), case.prompt_width(ids), 2)


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_penalty below 1": {"repetition_penalty": 0.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": "free"},
    "sequence_bias": {"sequence_bias": "free"},
    "suppress_tokens": {"suppress_tokens": "free"},
    "begin_suppress_tokens": {"begin_suppress_tokens": "free"},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": [8, 9]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6), "ends": True},
    "min_length": {"min_length": 12, "ends": True},
    "min_new_tokens": {"min_new_tokens": 9, "ends": True},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
}


def given(case: Pair, ids: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with tokens filled in that the free answers hold."""
    options = dict(options)
    free = theirs(case, ids).sequences.numpy()
    begin = case.prompt_width(ids)
    tokens = [[int(t) for t in row[begin : begin + 3]] for row in free]
    if options.pop("ends", False):
        options["eos_token_id"] = frequent(free, begin, 2)
    for name, value in options.items():
        if value == "free":
            options[name] = {
                "bad_words_ids": [tokens[0][:2], tokens[1], [tokens[2][0]]],
                "sequence_bias": [[tokens[0][:2], -9.0], [tokens[1], -3.0], [[tokens[2][0]], -2.0], [[5], 1.0]],
                "suppress_tokens": [row[1] for row in tokens],
                "begin_suppress_tokens": [row[0] for row in tokens],
            }[name]
    return options


def affected(case: Pair, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return prompts and options such that the option changes what transformers writes."""
    for seed in range(20):
        ids = prompts(case, seed)
        options = given(case, ids, PROCESSORS[name])
        ended = {key: value for key, value in options.items() if key == "eos_token_id"}
        free, changed = (theirs(case, ids, **o).sequences.numpy() for o in (ended, options))
        if free.shape != changed.shape or (free != changed).any():
            return ids, options
    raise AssertionError(f"{name} changes nothing")


# Scores that are finite already stay in order, and a first token is forced only after a prompt of one.
INERT = {"renormalize_logits"}
INERT_BEHIND_A_PROMPT = {"forced_bos_token_id"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("family", WRITERS)
def test_each_processor(family: str, name: str) -> None:
    case = main(family)
    if name in INERT or (name in INERT_BEHIND_A_PROMPT and case.task != "seq2seq"):
        ids = prompts(case)
        options = given(case, ids, PROCESSORS[name])
    else:
        ids, options = affected(case, name)
    same(case, ids, **options)


# T5 has a source of its own beside the prompt: both kinds of processors look at other tokens.
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "t5"])
def test_processors_together(family: str) -> None:
    case = main(family)
    ids = prompts(case)
    options: dict[str, Any] = {"min_new_tokens": 5, "eos_token_id": ends(case, ids)}
    for name in ("repetition_penalty", "no_repeat_ngram_size 2", "encoder_repetition_penalty", "sequence_bias"):
        options |= given(case, ids, PROCESSORS[name])
    for name in ("suppress_tokens", "bad_words_ids", "begin_suppress_tokens", "forced_eos_token_id"):
        options |= given(case, ids, PROCESSORS[name])
    same(case, ids, **options)


BEAMS: dict[str, dict[str, Any]] = {
    "two": {"num_beams": 2},
    "three": {"num_beams": 3, "num_return_sequences": 2},
    "five": {"num_beams": 5, "num_return_sequences": 5},
    "early": {"num_beams": 3, "early_stopping": True},
    "never": {"num_beams": 3, "early_stopping": "never"},
    "long": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "longer": {"num_beams": 3, "length_penalty": 2.0},
    "short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    "canonical": {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    "early and long": {"num_beams": 4, "length_penalty": 1.5, "early_stopping": True, "num_return_sequences": 4},
    "processed": {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "forced": {"num_beams": 3, "forced_eos_token_id": 7, "forced_bos_token_id": 9, "suppress_tokens": [5]},
    "normalised": {"num_beams": 3, "sequence_bias": [[[6], 1.0]], "renormalize_logits": True},
}


def good_ends(case: Pair, ids: np.ndarray, options: dict[str, Any]) -> list[int]:
    """Return two end-of-text tokens with which some answer ends early; where long ones win, that change some answer."""
    begin = case.prompt_width(ids)
    free = theirs(case, ids, **options).sequences.numpy()
    found = frequent(free, begin, 12)
    changing = None
    for pair_of_ends in itertools.pairwise([*found, found[0]]):
        tokens = theirs(case, ids, **options, eos_token_id=list(pair_of_ends)).sequences.numpy()
        if ends_early(tokens, begin, list(pair_of_ends)):
            return list(pair_of_ends)
        if tokens.shape != free.shape or (tokens != free).any():
            changing = changing or list(pair_of_ends)
    assert changing, f"no end-of-text token ever counts: {free}"
    return changing


def check_beams(family: str, name: str, seed: int = 0) -> Any:
    """Compare answers, their scores and where they come from, with ends that occur early; return both outputs."""
    case, options = main(family), BEAMS[name]
    ids = prompts(case, seed)
    options = options | {"eos_token_id": good_ends(case, ids, options)}
    want, got = same(case, ids, **options), ours(case, ids, **options, output_scores=True)
    # Sums of 16 logarithms, each within 1e-5, divided by at least a length.
    np.testing.assert_allclose(got.sequences_scores, want.sequences_scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.beam_indices, want.beam_indices)
    assert len(got.scores) == len(want.scores), "the search does not end where transformers' does"
    return case, ids, options


@pytest.mark.parametrize("name", ["three", "early"])
def test_beams(name: str) -> None:
    check_beams("llama", name)


def test_beams_of_an_answer() -> None:
    check_beams("t5", "canonical")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BEAMS)
@pytest.mark.parametrize("family", WRITERS)
def test_every_search(family: str, name: str, seed: int) -> None:
    case, ids, options = check_beams(family, name, seed)
    del options["eos_token_id"]
    same(case, ids, **options)


@pytest.mark.parametrize(("family", "beams"), [("llama", 1), pytest.param("t5", 3, marks=pytest.mark.slow)])
def test_recorded_scores_and_logits(family: str, beams: int) -> None:
    case = main(family)
    ids = prompts(case)
    options = {"num_beams": beams, "repetition_penalty": 1.5, "max_new_tokens": 6}
    want = theirs(case, ids, **options)
    got = ours(case, ids, **options, output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert len(got.scores) == len(got.logits) == len(want.scores) == 6
    for name in ("scores", "logits"):
        for step, (one, other) in enumerate(zip(got[name], want[name], strict=True)):
            assert one.dtype == np.float32
            # The parity of logits, 1e-4 of the largest, times the penalty.
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4, err_msg=f"{name} {step}")


@pytest.mark.parametrize("beams", [1, 2])
def test_other_tokens_are_no_near_tie(beams: int) -> None:
    case = main("llama")
    ids = prompts(case)
    want = theirs(case, ids, num_beams=beams)
    wrong = want.sequences.numpy().copy()
    wrong[1, -1] = (wrong[1, -1] + 1) % case.hf.config.vocab_size
    assert not is_near_tie(case, ids, wrong, want, {"num_beams": beams})
    assert is_near_tie(case, ids, want.sequences.numpy(), want, {"num_beams": beams})


def test_equal_scores_are_a_near_tie() -> None:
    case = main("llama")
    ids = prompts(case)
    want = theirs(case, ids)
    other = want.sequences.numpy().copy()
    second = want.scores[2][0].topk(2)
    want.scores[2][0, second.indices[1]] = second.values[0] - TIE / 2
    other[0, 6 + 2 :] = int(second.indices[1])
    assert is_near_tie(case, ids, other, want, {})
