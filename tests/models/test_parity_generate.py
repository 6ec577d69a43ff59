"""Every family of the table: greedy tokens are transformers' own, for 32 steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.inputs import pad
from tests.models.pairs import Pair, equal, pair
from tests.models.table import cases

STEPS = 32
TIE = 1e-4  # closer logits may be ordered either way by rounding


def prompts(case: Pair) -> tuple[np.ndarray, np.ndarray]:
    return pad(case.rows((7, 3, 5)), 7, left=not case.family.pads_right)


def theirs(case: Pair, ids: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
    """Return transformers' tokens; skips, and says so, where a choice was a near tie."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0} | options
    out = copy.deepcopy(case.hf).generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask).long(),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    best = torch.stack(out.logits).topk(2).values
    margin = float((best[..., 0] - best[..., 1]).min())
    if margin < TIE:
        pytest.skip(f"a near tie: the two likeliest tokens are {margin:.1e} apart; choose another seed")
    return out.sequences.numpy()


def ours(case: Pair, ids: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0} | options
    return np.asarray(case.ours.generate(ids, attention_mask=mask, **options).sequences)


@pytest.mark.proof("generate")
@pytest.mark.parametrize(("family", "variant"), cases("generate"))
def test_greedy(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = prompts(case)
    want = theirs(case, ids, mask)
    assert len(np.unique(want[:, case.prompt_width(ids) :])) > 5, "a constant sequence tests nothing"
    equal(ours(case, ids, mask), want)


@pytest.mark.proof("end_of_text")
@pytest.mark.parametrize(("family", "variant"), cases("end_of_text"))
def test_end_of_text(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = prompts(case)
    begin = case.prompt_width(ids)
    free = theirs(case, ids, mask)
    one, two = int(free[0, begin + 9]), int(free[1, begin + 4])
    for options in (
        {"eos_token_id": one},
        {"eos_token_id": [one, two]},
        {"eos_token_id": [one, two], "min_new_tokens": 12},
        {"eos_token_id": [int(t) for t in free[:, begin + 2]]},
    ):
        want = theirs(case, ids, mask, **options)
        equal(ours(case, ids, mask, **options), want, str(options))
    assert want.shape[1] < begin + STEPS, "no row ended early"


@pytest.mark.proof("right_padding")
@pytest.mark.parametrize(("family", "variant"), cases("right_padding"))
def test_right_padding_equals_left(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = prompts(case)
    right, right_mask = pad([row[keep == 1] for row, keep in zip(ids, mask, strict=True)], 7, left=False)
    begin = case.prompt_width(ids)
    left_tokens = ours(case, ids, mask)[:, begin:]
    out = ours(case, right, right_mask)
    if begin == 7:
        equal(out[:, :7], right)
    equal(out[:, begin:], left_tokens)


def test_attention_mask_is_made_of_ones_if_not_given() -> None:
    case = pair("llama", "gqa")
    ids = case.ids(2, 6)
    want = theirs(case, ids, np.ones_like(ids))
    got = case.ours.generate(ids, max_new_tokens=STEPS, do_sample=False)
    np.testing.assert_array_equal(got.sequences, want)
