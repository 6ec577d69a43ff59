"""Models that keep no cache: one warning, and the tokens of a naive loop."""

from __future__ import annotations

import numpy as np
import pytest

from tests.generation.tiny import VOCAB, Plain, plain

STEPS = 9


def naive(model: Plain, row: np.ndarray) -> np.ndarray:
    """Continue a row by numpy alone: JAX would compile each length anew."""
    table, mix, head = model.embed.embedding, model.mix, model.head
    for _ in range(STEPS):
        x = np.asarray(table[...])[row] * 5  # what the last token sees are all, whatever the kind
        seen = np.tanh(x[-1] @ np.asarray(mix.kernel[...]) + np.asarray(mix.bias[...]) + x.sum(axis=0))
        row = np.append(row, (seen @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...])).argmax())
    return row


def prompts(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng((n, i)).integers(0, VOCAB, n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", ["causal", "masked", "blind"])
def test_equals_a_naive_loop(kind: str) -> None:
    rows = prompts(5, 5)
    with pytest.warns(UserWarning, match="Plain takes no cache") as caught:
        out = plain(kind).generate(np.stack(rows), max_new_tokens=STEPS)
    assert len(caught) == 1
    want = [naive(plain(kind), row) for row in rows]
    assert len({tuple(w[5:]) for w in want}) == 2, "both rows say the same: nothing is tested"
    np.testing.assert_array_equal(out.sequences, want)


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("left", [True, False])
def test_rows_of_unequal_lengths(kind: str, left: bool) -> None:
    rows = prompts(6, 2, 4)
    ids, mask = np.zeros((3, 6), int), np.zeros((3, 6), int)
    for index, row in enumerate(rows):
        place = slice(6 - len(row), 6) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    with pytest.warns(UserWarning, match="takes no cache"):
        out = np.asarray(plain(kind).generate(ids, attention_mask=mask, max_new_tokens=STEPS).sequences)
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(out[index, 6:], naive(plain(kind), row)[len(row) :], err_msg=str(index))


def test_unequal_lengths_are_refused_where_padding_is_seen() -> None:
    ids, mask = np.ones((2, 4), int), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    with pytest.warns(UserWarning, match="takes no cache"), pytest.raises(ValueError, match="one by one"):
        plain("blind").generate(ids, attention_mask=mask, max_new_tokens=2)


def test_unequal_lengths_are_refused_where_the_longest_prompt_nearly_fills_the_buffer() -> None:
    model, width, new = plain("blind"), 30, 2
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, width))
    mask = np.ones_like(ids)
    mask[1, :20] = 0
    with pytest.warns(UserWarning, match="takes no cache"), pytest.raises(ValueError, match="one by one"):
        model.generate(ids, attention_mask=mask, max_new_tokens=new)


def test_end_of_text_and_stream() -> None:
    row = prompts(5)[0]
    want = naive(plain("causal"), row)[5:]
    end = int(want[4])
    stop = list(want).index(end) + 1
    with pytest.warns(UserWarning, match="takes no cache"):
        out = np.asarray(plain("causal").generate(row[None], max_new_tokens=STEPS, eos_token_id=end).sequences)
    np.testing.assert_array_equal(out[0, 5:], want[:stop])
    with pytest.warns(UserWarning, match="takes no cache"):
        steps = list(plain("causal").stream(row[None], max_new_tokens=STEPS, eos_token_id=end))
    np.testing.assert_array_equal(np.concatenate(steps), want[:stop])


def test_stream_where_every_length_is_run_on_its_own() -> None:
    row = prompts(5)[0]
    with pytest.warns(UserWarning, match="takes no cache"):
        steps = list(plain("blind").stream(row[None], max_new_tokens=STEPS))
    np.testing.assert_array_equal(np.concatenate(steps), naive(plain("blind"), row)[5:])
