"""Sampling: the kept set is transformers' own, draws follow the exact distribution."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from easydel.generation.options import GenerationOptions
from easydel.generation.processors import apply, processors_of, warpers
from easydel.generation.search import draw
from easydel.generation.written import Written

VOCAB = 12
LOGITS = np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32) * 2
NOTHING: Any = None  # warpers do not look back


def same(ours: Any, warper: Any, logits: np.ndarray = LOGITS) -> None:
    np.testing.assert_array_equal(ours(NOTHING, logits), warper(None, torch.from_numpy(logits)).numpy())


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 5, VOCAB, 100])
def test_top_k(k: int, least: int) -> None:
    same(warpers.TopK(np.int32(k), least), theirs.TopKLogitsWarper(k, min_tokens_to_keep=least))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p(p: float, least: int) -> None:
    same(warpers.TopP(np.float32(p), least), theirs.TopPLogitsWarper(p, min_tokens_to_keep=least))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("p", [0.0, 0.02, 0.2, 0.7, 1.0])
def test_min_p(p: float, least: int) -> None:
    same(warpers.MinP(np.float32(p), least), theirs.MinPLogitsWarper(p, min_tokens_to_keep=least))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_typical(mass: float, least: int) -> None:
    same(warpers.Typical(np.float32(mass), least), theirs.TypicalLogitsWarper(mass, min_tokens_to_keep=least))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("cutoff", [0.001, 0.03, 0.2, 0.9])
def test_epsilon_and_eta(cutoff: float, least: int) -> None:
    same(warpers.Epsilon(np.float32(cutoff), least), theirs.EpsilonLogitsWarper(cutoff, min_tokens_to_keep=least))
    same(warpers.Eta(np.float32(cutoff), least), theirs.EtaLogitsWarper(cutoff, min_tokens_to_keep=least))


def test_scores_that_are_banned_stay_so() -> None:
    logits = LOGITS.copy()
    logits[:, [2, 7]] = -np.inf
    for ours, warper in (
        (warpers.TopK(np.int32(4)), theirs.TopKLogitsWarper(4)),
        (warpers.TopP(np.float32(0.8)), theirs.TopPLogitsWarper(0.8)),
        (warpers.MinP(np.float32(0.1)), theirs.MinPLogitsWarper(0.1)),
        (warpers.Typical(np.float32(0.8)), theirs.TypicalLogitsWarper(0.8)),
        (warpers.Epsilon(np.float32(0.05)), theirs.EpsilonLogitsWarper(0.05)),
        (warpers.Eta(np.float32(0.1)), theirs.EtaLogitsWarper(0.1)),
    ):
        same(ours, warper, logits)


def test_ties_of_top_k_stay() -> None:
    logits = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    same(warpers.TopK(np.int32(1)), theirs.TopKLogitsWarper(1), logits)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def exact(scores: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Return the distribution that options ask for, in float64, straight from each option's definition."""
    scores = scores.astype(np.float64) / options.get("temperature", 1.0)
    for name, value in options.items():
        p = softmax(scores)
        information = -np.log(np.where(p > 0, p, 1))
        entropy = (p * information).sum()
        keep = np.ones(len(p), bool)
        if name == "top_k":
            keep = p >= np.sort(p)[-value]
        elif name in ("top_p", "typical_p"):
            order = np.argsort(-p if name == "top_p" else np.abs(information - entropy))
            keep = np.zeros(len(p), bool)
            keep[order[: np.searchsorted(np.cumsum(p[order]), value) + 1]] = True
        elif name == "min_p":
            keep = p >= value * p.max()
        elif name == "epsilon_cutoff":
            keep = p >= value
        elif name == "eta_cutoff":
            keep = p >= min(value, np.sqrt(value) * np.exp(-entropy))
        scores = np.where(keep, scores, -np.inf)
    return softmax(scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.06},
        {"eta_cutoff": 0.3},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, draws = LOGITS[0], 20_000
    probabilities = exact(logits, options)
    processors = processors_of(GenerationOptions(do_sample=True, **options), None)
    keys = jax.random.split(jax.random.key(7), draws)
    choose = jax.jit(lambda scores, keys: draw(apply(processors, NOTHING, scores), keys, np.int32(3)))
    counts = np.bincount(choose(np.broadcast_to(logits, (draws, VOCAB)), keys), minlength=VOCAB)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    if set(options) - {"temperature"}:
        assert 1 < kept.sum() < VOCAB, "everything or one token is kept: nothing is tested"
    statistic = ((counts - draws * probabilities)[kept] ** 2 / (draws * probabilities[kept])).sum()
    freedom = kept.sum() - 1
    # The seed is fixed; by chance alone one seed in about 30 000 would lie four deviations above the mean.
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom) + 4, (statistic, freedom)


def test_draws_of_a_row_depend_on_its_key_and_the_step_alone() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    scores = np.broadcast_to(LOGITS[0], (4, VOCAB))
    all_rows = [np.asarray(draw(scores, keys, np.int32(step))) for step in range(6)]
    assert len({tuple(row) for row in all_rows}) > 1
    np.testing.assert_array_equal(draw(scores[:2], keys[:2], np.int32(3)), all_rows[3][:2])


def test_written_is_not_needed() -> None:
    written = Written(np.zeros((5, 4), np.int32), np.zeros(5, np.int32), np.int32(2), np.int32(1))
    for warper in processors_of(GenerationOptions(do_sample=True, top_k=3, min_p=0.1), None):
        np.testing.assert_array_equal(warper(written, LOGITS), warper(NOTHING, LOGITS))
