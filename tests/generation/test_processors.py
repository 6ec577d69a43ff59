"""Each processor gives the scores of transformers' own, and padded rows those of the same rows alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from easydel.generation.options import GenerationOptions
from easydel.generation.processors import apply, processors_of
from easydel.generation.written import NO_TOKEN, Written

VOCAB, CAPACITY = 11, 40
ROWS = 3
SOURCE = np.random.default_rng(5).integers(0, VOCAB, (ROWS, 7)).astype(np.int32)


def scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, VOCAB)).astype(np.float32) * 3


def tokens(length: int) -> np.ndarray:
    # Few different tokens, so that they repeat.
    return np.random.default_rng(length).integers(0, 5, (ROWS, length)).astype(np.int32)


def written(ids: np.ndarray, step: int, pads: int = 0) -> Written:
    """Put tokens behind `pads` columns of padding; what lies there and behind must not matter."""
    buffer = np.full((len(ids), CAPACITY), 1, np.int32)
    buffer[:, pads : pads + ids.shape[1]] = ids
    return Written(buffer, np.full(len(ids), pads, np.int32), np.int32(pads + ids.shape[1]), np.int32(step))


compiled = jax.jit(apply)  # op by op it takes many times as long


def ours(options: dict[str, Any], ids: np.ndarray, step: int, given: np.ndarray, pads: int = 0) -> np.ndarray:
    processors = processors_of(GenerationOptions(**options), SOURCE)
    assert len(processors) == 1
    run = apply if "sequence_bias" in options else compiled  # biases are added up in an order of XLA's own
    return np.asarray(run(processors, written(ids, step, pads), given))


EOS = {"eos_token_ids": (2, 6)}
BAD = [[3], [2], [1, 4], [0, 2, 3], [4, 4, 4, 4, 1]]
BIAS = {(3,): -2.5, (7,): 1.5, (1, 4): 4.0, (2, 4): 8.0, (0, 2, 3): -7.0, (1, 3): 2.0}
TABLE: dict[str, tuple[dict[str, Any], Any]] = {
    # our options, and transformers' processor of a prompt's length
    "repetition": ({"repetition_penalty": 1.7}, lambda n: theirs.RepetitionPenaltyLogitsProcessor(1.7)),
    "repetition rewarded": ({"repetition_penalty": 0.6}, lambda n: theirs.RepetitionPenaltyLogitsProcessor(0.6)),
    "encoder repetition": (
        {"encoder_repetition_penalty": 1.4},
        lambda n: theirs.EncoderRepetitionPenaltyLogitsProcessor(1.4, torch.from_numpy(SOURCE).long()),
    ),
    **{
        f"no {size}-gram": (
            {"no_repeat_ngram_size": size},
            lambda n, size=size: theirs.NoRepeatNGramLogitsProcessor(size),
        )
        for size in (1, 2, 3, 4)
    },
    **{
        f"no encoder {size}-gram": (
            {"encoder_no_repeat_ngram_size": size},
            lambda n, size=size: theirs.EncoderNoRepeatNGramLogitsProcessor(size, torch.from_numpy(SOURCE).long()),
        )
        for size in (1, 2, 3)
    },
    "bad words": (
        {"bad_words_ids": tuple(map(tuple, BAD)), **EOS},
        lambda n: theirs.NoBadWordsLogitsProcessor(BAD, [2, 6]),
    ),
    "sequence bias": ({"sequence_bias": tuple(BIAS.items())}, lambda n: theirs.SequenceBiasLogitsProcessor(BIAS)),
    "least": (
        {"min_new_tokens": 3, **EOS},
        lambda n: theirs.MinNewTokensLengthLogitsProcessor(n, 3, [2, 6]),
    ),
    "forced bos": ({"forced_bos_token_id": 5}, lambda n: theirs.ForcedBOSTokenLogitsProcessor(5)),
    "forced eos": (
        {"forced_eos_token_id": (5, 8), "max_new_tokens": 4},
        lambda n: theirs.ForcedEOSTokenLogitsProcessor(n + 4, [5, 8]),
    ),
    "decay": (
        {"exponential_decay_length_penalty": (2, 1.3), **EOS},
        lambda n: theirs.ExponentialDecayLengthPenalty((2, 1.3), [2, 6], n),
    ),
    "suppress": ({"suppress_tokens": (0, 9)}, lambda n: theirs.SuppressTokensLogitsProcessor([0, 9])),
    "begin": (
        {"begin_suppress_tokens": (0, 9)},
        lambda n: theirs.SuppressTokensAtBeginLogitsProcessor([0, 9], n),
    ),
    "finite": ({"remove_invalid_values": True}, lambda n: theirs.InfNanRemoveLogitsProcessor()),
    "renormalised": ({"renormalize_logits": True}, lambda n: theirs.LogitNormalization()),
}
# float32 rounds the power and the normalisation differently; all others must agree to the bit.
ROUNDED = {"decay", "renormalised"}


@pytest.mark.parametrize("name", TABLE)
def test_equals_transformers_at_every_length(name: str) -> None:
    options, make = TABLE[name]
    effects = 0
    for prompt in (1, 4):
        processor = make(prompt)
        for step in range(12):
            ids, given = tokens(prompt + step), scores(step)
            if name == "finite":
                given[0, :3] = np.nan, np.inf, -np.inf
            want = processor(torch.from_numpy(ids).long(), torch.from_numpy(given)).numpy()
            for pads in (0, 9):
                got = ours(options, ids, step, given, pads)
                tolerance = 1e-6 if name in ROUNDED else 0
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=f"{prompt} {step} {pads}")
            effects += bool((want != given).any())
    assert effects, "the processor never changed anything"


def test_begin_is_one_token_later_where_the_first_is_forced() -> None:
    options = GenerationOptions(forced_bos_token_id=5, begin_suppress_tokens=(9,))
    processors = processors_of(options, None)
    for prompt, step, banned in ((1, 0, False), (1, 1, True), (1, 2, False), (4, 0, True), (4, 1, False)):
        got = np.asarray(processors[1](written(tokens(prompt + step), step), scores()))
        assert np.isinf(got[:, 9]).all() == banned, (prompt, step)


def test_frequency_and_presence_follow_openai_s_formula() -> None:
    ids, step, given = tokens(9), 5, scores()
    got = ours({"frequency_penalty": 0.7, "presence_penalty": -0.4}, ids, step, given, pads=3)
    want = given.copy()
    for row in range(ROWS):
        for token in range(VOCAB):
            count = list(ids[row, -step:]).count(token)
            want[row, token] -= count * 0.7 - 0.4 * (count > 0)
    np.testing.assert_allclose(got, want, atol=1e-6)  # rounding of float32
    assert (want != given).any()


def test_the_source_s_padding_counts_for_nothing() -> None:
    padded = np.concatenate([np.full((ROWS, 3), NO_TOKEN, np.int32), SOURCE], axis=1)
    ids = tokens(6)
    for options in (
        GenerationOptions(encoder_repetition_penalty=1.4),
        GenerationOptions(encoder_no_repeat_ngram_size=2),
    ):
        got, want = (compiled(processors_of(options, s), written(ids, 2), scores()) for s in (padded, SOURCE))
        np.testing.assert_array_equal(got, want)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder_repetition_penalty=1\.4 needs"):
        processors_of(GenerationOptions(encoder_repetition_penalty=1.4), None)


def test_the_order_is_transformers() -> None:
    everything = GenerationOptions(
        do_sample=True, sequence_bias=tuple(BIAS.items()), encoder_repetition_penalty=1.1, repetition_penalty=1.2,
        no_repeat_ngram_size=4, encoder_no_repeat_ngram_size=4, bad_words_ids=((3, 3),), min_new_tokens=1,
        forced_bos_token_id=1, forced_eos_token_id=(2,), remove_invalid_values=True,
        exponential_decay_length_penalty=(1, 1.1), suppress_tokens=(9,), begin_suppress_tokens=(8,), top_k=9, top_p=0.9,
        min_p=0.1, typical_p=0.9, epsilon_cutoff=0.01, eta_cutoff=0.01, renormalize_logits=True,
        logits_processor=(lambda ids, s: s,), presence_penalty=0.1, **EOS,
    )  # fmt: skip
    names = [type(p).__name__ for p in processors_of(everything, SOURCE)]
    assert names == [
        "SequenceBias", "SourceRepetitionPenalty", "RepetitionPenalty", "CountPenalty", "NoRepeatNgram",
        "NoRepeatSourceNgram", "SequenceBias", "MinNewTokens", "ForcedBos", "ForcedEos", "RemoveInvalid",
        "ExponentialDecay", "SuppressTokens", "BeginSuppressTokens", "Own", "Temperature", "TopK", "TopP", "MinP",
        "Typical", "Epsilon", "Eta", "Renormalize",
    ]  # fmt: skip


def test_many_ids() -> None:
    got = ours({"suppress_tokens": tuple(range(10))}, tokens(2), 0, scores())
    assert np.isinf(got[:, :10]).all()
    assert np.isfinite(got[:, 10]).all()
