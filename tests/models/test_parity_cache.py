"""Every family of the table: a cached run equals an uncached one, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.models.inputs import int32, pad
from tests.models.pairs import Pair, close, pair
from tests.models.table import FAMILIES, cases, quick

SAME = 1e-5  # the same sums in another order
SIZES = (3, 1, 1, 3, 1, 3)
PREFILL = 6


def run_in_parts(
    case: Pair, cache: Any, ids: np.ndarray, mask: np.ndarray, mode: str, sizes: tuple = SIZES
) -> np.ndarray:
    """Return the logits of a prefill and several continuations; `mode` says what mask is given."""
    parts, done = [], 0
    for size in (PREFILL, *np.random.default_rng(0).permutation(sizes)):
        end = done + int(size)
        given = None
        if mode == "new" or (mode == "prompt" and done == 0):
            given = mask[:, done:end]
        elif mode == "full":
            given = mask[:, :end]
        out = case.run(**case.continuing(ids[:, done:end], given, first=done == 0), cache=cache)
        cache, done = out.cache, end
        parts.append(np.asarray(out.logits))
    assert done == ids.shape[1]
    assert int(cache.index) == done
    return np.concatenate(parts, axis=1)


def padded(case: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return two rows, the second with four tokens of padding."""
    length = PREFILL + sum(SIZES)
    return pad([case.ids(1, length)[0], case.ids(1, length - 4, seed=1)[0]], length, left=True)


@pytest.mark.proof("cache")
@pytest.mark.parametrize(("family", "variant"), cases("cache"))
def test_cached_equals_uncached(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = padded(case)
    want = np.asarray(case.run(**case.continuing(ids, mask)).logits)
    cache = case.ours.init_operations_cache(2, ids.shape[1] + 5)
    got = run_in_parts(case, cache, ids, mask, "prompt")
    close(got[mask == 1], want[mask == 1], SAME)


MAINS = [pytest.param(n, v, marks=quick(n)) for n, v in cases("cache") if v == FAMILIES[n].main.name]


@pytest.mark.proof("cache")
@pytest.mark.parametrize(("family", "variant"), MAINS)
def test_padding_may_be_told_with_every_part_or_to_the_cache(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = padded(case)
    want = np.asarray(case.run(**case.continuing(ids, mask)).logits)
    for mode, starts in {"new": None, "starts": [0, 4]}.items():
        cache = case.ours.init_operations_cache(2, ids.shape[1] + 5, starts=None if starts is None else int32(starts))
        got = run_in_parts(case, cache, ids, mask, mode)
        close(got[mask == 1], want[mask == 1], SAME, mode)


@pytest.mark.proof("mask_width")
@pytest.mark.parametrize(("family", "variant"), cases("mask_width"))
def test_mask_of_the_full_width(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = pad([case.ids(1, 10)[0], case.ids(1, 6, seed=1)[0]], 10, left=True)
    want = np.asarray(case.run(**case.continuing(ids, mask)).logits)
    got = run_in_parts(case, case.ours.init_operations_cache(2, 10), ids, mask, "full", sizes=(3, 1))
    close(got[mask == 1], want[mask == 1], SAME)


@pytest.mark.proof("gaps")
@pytest.mark.parametrize(("family", "variant"), cases("gaps"))
def test_padding_between_tokens(family: str, variant: str) -> None:
    """Masked tokens inside a continuation (right padding of a chunk) leave the others as they are."""
    case = pair(family, variant)
    ids = case.ids(1, 8)
    want = np.asarray(case.run(input_ids=ids).logits)
    out = case.run(
        input_ids=np.concatenate([ids[:, :3], ids[:, :3]], axis=1),
        attention_mask=int32([[1, 1, 1, 0, 0, 0]]),
        cache=case.ours.init_operations_cache(1, 16),
    )
    rest = case.run(input_ids=ids[:, 3:], cache=out.cache)
    close(rest.logits, want[:, 3:], SAME)


def test_what_does_not_fit_is_refused() -> None:
    case = pair("llama", "gqa")
    model, cache = case.ours, case.ours.init_operations_cache(2, 8)
    full = model(input_ids=int32(case.ids(2, 6)), cache=cache).cache
    for match, inputs in (
        ("6 are written and 3 more do not fit", {"input_ids": int32(case.ids(2, 3)), "cache": full}),
        ("batch_size=2", {"input_ids": int32(case.ids(3, 1)), "cache": full}),
        ("width 4", {"input_ids": int32(case.ids(2, 1)), "cache": full, "attention_mask": int32(np.ones((2, 4)))}),
        (
            "does not cover",
            {"input_ids": int32(case.ids(2, 2)), "cache": full, "attention_mask": int32(np.ones((2, 1)))},
        ),
        ("segment_ids", {"input_ids": int32(case.ids(2, 1)), "cache": full, "segment_ids": int32([[0], [0]])}),
        ("attention_mask", {"input_ids": int32(case.ids(2, 3)), "attention_mask": int32(np.ones((2, 4)))}),
        ("neither", {}),
    ):
        with pytest.raises(ValueError, match=match):
            model(**inputs)
    with pytest.raises(ValueError, match="batch_size=2"):
        jax.jit(lambda ids, cache: model(input_ids=ids, cache=cache).logits)(int32(case.ids(3, 1)), full)
    for bad in ([0], [0, 9], [-1, 0], [0.5, 0.0]):
        with pytest.raises(ValueError, match="starts"):
            model.init_operations_cache(2, 8, starts=np.asarray(bad))
    with pytest.raises(ValueError, match="positive"):
        model.init_operations_cache(0, 8)
