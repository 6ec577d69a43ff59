"""The same prompts continued by transformers and by ours, and what counts as equal."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.inputs import as_torch
from tests.models.pairs import Pair

TIE = 1e-4
"""Closer scores may be ordered either way by the rounding of float32 logits, whose errors are up to some 1e-5."""
STEPS = 16
PAD = 3
"""Not 0: with that, transformers' beam search fills ended rows with the end-of-text token."""


class Noise:
    """A processor of transformers that moves scores by less than `TIE`."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + (torch.rand(scores.shape, generator=self.generator) - 0.5) * TIE


def ours(case: Pair, ids: np.ndarray, **options: Any) -> Any:
    """Return what we make of prompts."""
    return case.ours.generate(ids, **{"max_new_tokens": STEPS, "pad_token_id": PAD} | options)


def theirs(case: Pair, ids: np.ndarray, **options: Any) -> Any:
    """Return what transformers makes of them."""
    options = {"max_new_tokens": STEPS, "pad_token_id": PAD, "do_sample": False, "num_beams": 1} | options
    if case.family.name in ("mamba", "falcon_mamba", "mamba2") and options["num_beams"] > 1:
        options["use_cache"] = False  # transformers does not reorder its cache
    inputs = as_torch({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with torch.no_grad():
        return copy.deepcopy(case.hf).generate(**inputs, **flags, **options)


def same(case: Pair, ids: np.ndarray, **options: Any) -> Any:
    """Assert that both write the same tokens and return transformers' output; skips, and says so, at a near tie."""
    want = theirs(case, ids, **options)
    # Recorded always, so that what reads the scores too need not compile anew.
    got = np.asarray(ours(case, ids, **options, output_scores=True).sequences)
    tokens = want.sequences.numpy()
    if got.shape == tokens.shape and (got == tokens).all():
        return want
    if is_near_tie(case, ids, got, want, options):
        pytest.skip(
            f"a near tie: scores are less than {TIE} apart in {case.family.name}, {options}; choose another seed"
        )
    np.testing.assert_array_equal(got, tokens, err_msg=f"{case.family.name} {options}")
    return want


def is_near_tie(case: Pair, ids: np.ndarray, got: np.ndarray, want: Any, options: dict[str, Any]) -> bool:
    """Whether rounding can explain other tokens.

    Without beams: where a row first differs, transformers' two best scores must be closer than `TIE`. With beams, where
    also what is dropped counts: transformers itself must give our tokens if its scores are moved by less than `TIE`.
    """
    if options.get("num_beams", 1) == 1:
        begin = case.prompt_width(ids)
        width = min(got.shape[1], want.sequences.shape[1])
        for row, (one, other) in enumerate(zip(got[:, :width], want.sequences.numpy()[:, :width], strict=True)):
            if (one != other).any():
                best = want.scores[int((one != other).argmax()) - begin][row].topk(2).values
                if float(best[0] - best[1]) >= TIE:
                    return False
        return True
    moved = (theirs(case, ids, **options, logits_processor=[Noise(seed)]).sequences.numpy() for seed in range(8))
    return any(tokens.shape == got.shape and (tokens == got).all() for tokens in moved)


def frequent(tokens: np.ndarray, begin: int, count: int) -> list[int]:
    """Return tokens that were written in the middle of several answers: good ends."""
    middle = tokens[:, begin + 2 : begin + STEPS - 2].reshape(-1)
    values, times = np.unique(middle, return_counts=True)
    return [int(token) for token in values[np.argsort(-times, kind="stable")][:count]]


def ends_early(tokens: np.ndarray, begin: int, ends: list[int]) -> bool:
    """Whether some row ends before its last column, and not at once."""
    return bool(np.isin(tokens[:, begin + 1 : begin + STEPS - 1], ends).any())
