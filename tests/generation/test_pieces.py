"""Prompts in pieces of few sizes: the same results as in one, and few compilations."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import CompilationCounter
from easydel.generation.loop import cached_loop
from easydel.generation.prefix import feed_of
from easydel.generation.prompts import Pieces, rows_for
from easydel.structure import split_again
from tests.caching.test_mixed_caches import CONFIG, MixedLM
from tests.generation.tiny import VOCAB, llama

RNG = np.random.default_rng(0)


def prompts(batch: int, length: int, vocab: int = VOCAB) -> np.ndarray:
    return RNG.integers(1, vocab, (batch, length))


@pytest.mark.parametrize(("tokens", "more"), [(1, 1), (128, 128), (129, 4), (193, 40), (250, 7), (600, 1), (2048, 4)])
@pytest.mark.parametrize("exact", [False, True])
def test_pieces_hold_the_prompt(tokens: int, more: int, exact: bool) -> None:
    pieces = Pieces.plan(tokens, more, 9, exact=exact)
    assert tokens <= pieces.width <= pieces.slots - more - 9
    assert pieces.width == tokens if exact else pieces.width < tokens + max(64, tokens)
    assert pieces.slots in (256, 1024, 4096)


def test_rows_are_few_sizes() -> None:
    assert [rows_for(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 24]


def mixed() -> MixedLM:
    return MixedLM(CONFIG, rngs=nnx.Rngs(0))


def scanned() -> Any:
    config = easydel.LlamaConfig(**llama().config.to_dict() | {"num_hidden_layers": 2, "scan_layers": True})
    return easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("full", marks=pytest.mark.slow),
        "recurrent, full and sliding",
        pytest.param("in a scan", marks=pytest.mark.slow),
    ],
)
def test_pieces_give_the_logits_of_the_whole(kind: str) -> None:
    """Rows of 700 and 5 tokens: one large piece and three small ones, all but the last of them padding for one row."""
    model = {"full": llama, "recurrent, full and sliding": mixed, "in a scan": scanned}[kind]()
    ids, mask = prompts(2, 700), np.ones((2, 700), bool)
    mask[1, :695] = False
    pieces, feed = feed_of(ids, mask, 4, None)
    assert pieces.counts == (1, 3)
    structure, params, other = split_again(model)
    loop = cached_loop(structure, pieces.slots)
    logits, cache = loop.read(pieces.sizes, params, other, feed, None)
    for row in range(2):
        tokens = ids[row][mask[row]][None]
        want = np.asarray(jax.jit(lambda ids: model(input_ids=ids).logits)(tokens))[0, -1]
        # float32's rounding in sums of another order, relative to the largest logit
        np.testing.assert_allclose(logits[row], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(cache.seen, [700, 5])


@pytest.mark.slow
def test_padded_rows_give_the_tokens_of_the_row_alone() -> None:
    ids, mask = prompts(3, 300), np.ones((3, 300), bool)
    mask[1, :290], mask[2, :40] = False, False
    together = np.asarray(llama().generate(ids, attention_mask=mask, max_new_tokens=6).sequences)
    assert together.shape == (3, 306), "rows that were added must not be handed back"
    for row in range(3):
        alone = llama().generate(ids[row][mask[row]][None], max_new_tokens=6).sequences
        np.testing.assert_array_equal(together[row, 300:], np.asarray(alone)[0, -6:])


def test_int8_keys_of_earlier_pieces_are_read_back() -> None:
    """Later pieces see earlier ones rounded to int8: an error of that size, and no other."""
    ids = prompts(1, 700)
    pieces, feed = feed_of(ids, np.ones((1, 700), bool), 4, None)
    structure, params, other = split_again(llama())
    logits, _ = cached_loop(structure, pieces.slots, "int8").read(pieces.sizes, params, other, feed, None)
    want = np.asarray(jax.jit(lambda ids: llama()(input_ids=ids).logits)(ids))[0, -1]
    # codes are off by at most 1/254 of a head's largest number; keys and values both, and softmax once more
    np.testing.assert_allclose(logits[0], want, atol=0.02 * np.abs(want).max())


def count_compilations(model: Any, cases: list[tuple[int, int]]) -> int:
    with CompilationCounter() as counter:
        for batch, length in cases:
            out = model.generate(prompts(batch, length), max_new_tokens=4).sequences
            assert out.shape == (batch, length + 4)
    return counter.count


def test_few_compilations_for_lengths_and_batches_in_any_order() -> None:
    model = llama(vocab=25)
    # Rows of 1 and of 4 in caches of 256 slots: each a program for prompts and one for the loop.
    assert 0 < count_compilations(model, [(1, 1), (3, 200), (4, 30), (1, 77)]) <= 4
    assert count_compilations(model, [(1, 230), (3, 1), (4, 150)]) == 0


@pytest.mark.slow
def test_all_lengths_and_batches_need_24_compilations() -> None:
    model = llama(vocab=27)
    cases = [(b, n) for b in range(1, 9) for n in (1, 2048)]
    cases += [(int(b), int(n)) for b, n in zip(RNG.integers(1, 9, 60), RNG.integers(1, 2049, 60), strict=True)]
    RNG.shuffle(cases)
    assert 0 < count_compilations(model, cases) <= 24


def test_a_long_cache_is_read_as_far_as_it_is_written() -> None:
    """Above 4096 slots a single token, too, reads blocks; the result is that of the short cache."""
    ids = prompts(1, 20)
    run = jax.jit(lambda ids, cache: llama()(input_ids=ids, cache=cache))
    results = []
    for slots in (64, 8192):
        out = run(ids, llama().init_operations_cache(1, slots))
        results.append(run(ids[:, :1], out.cache).logits)
    np.testing.assert_allclose(results[0], results[1], atol=1e-5 * np.abs(results[0]).max())  # order of sums
