"""Sampling: the kept set is transformers' own, draws follow the exact distribution."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from easydel.generation.options import GenerationOptions
from easydel.generation.sampling import Sampler, keep_top_k, keep_top_p

VOCAB = 12
LOGITS = np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32) * 2


def warped(logits: np.ndarray, warper: Any) -> np.ndarray:
    return warper(None, torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("k", [1, 2, 5, VOCAB, 100])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    np.testing.assert_array_equal(keep_top_k(LOGITS, np.int32(k)), warped(LOGITS, logits_process.TopKLogitsWarper(k)))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_transformers_keeps(p: float) -> None:
    np.testing.assert_array_equal(keep_top_p(LOGITS, np.float32(p)), warped(LOGITS, logits_process.TopPLogitsWarper(p)))


def test_ties_of_top_k_stay() -> None:
    logits = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    np.testing.assert_array_equal(keep_top_k(logits, np.int32(1)), warped(logits, logits_process.TopKLogitsWarper(1)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8},
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, draws = LOGITS[0], 20_000
    expected = torch.from_numpy(logits[None]) / options.get("temperature", 1.0)
    if "top_k" in options:
        expected = logits_process.TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = logits_process.TopPLogitsWarper(options["top_p"])(None, expected)
    probabilities = expected.softmax(-1)[0].double().numpy()

    sampler = Sampler.create(GenerationOptions(do_sample=True, **options))
    keys = jax.random.split(jax.random.key(7), draws)
    tokens = jax.jit(sampler.choose)(np.broadcast_to(logits, (draws, VOCAB)), keys, np.int32(3))
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    statistic = ((counts - draws * probabilities)[kept] ** 2 / (draws * probabilities[kept])).sum()
    freedom = kept.sum() - 1
    # The seed is fixed; by chance alone one seed in about 30 000 would lie four deviations above the mean.
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom) + 4, (statistic, freedom)


def test_end_of_text_is_suppressed_until_enough_tokens_are_made() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 4], logits[0, 2] = 5.0, 4.0
    sampler = Sampler.create(GenerationOptions(max_new_tokens=9, min_new_tokens=3, eos_token_ids=(4,)))
    keys = jax.random.split(jax.random.key(0), 1)
    assert [int(sampler.choose(logits, keys, np.int32(step))[0]) for step in (0, 2, 3)] == [2, 2, 4]


def test_many_end_of_text_ids() -> None:
    sampler = Sampler.create(GenerationOptions(eos_token_ids=tuple(range(11))))
    np.testing.assert_array_equal(sampler.is_eos(np.arange(-1, 13)), [False] + [True] * 11 + [False] * 2)
