"""Rows: every token once, in order, apart from other documents; the same from anywhere, on any number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easydel.training.data import IGNORED, DataConfig, Statistics, make_loader
from tests.training.letters import BEGIN, END, PAD, LetterTokenizer, unique_texts

TOKENIZER = LetterTokenizer()
ROOT = Path(__file__).parents[2]
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def config_of(**changes):
    return DataConfig(**{"sequence_length": 12, "prefetch": 0, "epochs": 1, "packing_rows": 3} | changes)


def batches_of(texts, config, batch_size=3, **options):
    return list(make_loader(texts, TOKENIZER, batch_size=batch_size, config=config, drop_remainder=False, **options))


def rows_of(batches, packed):
    """Check the form of every row and yield its windows as (ids, labels)."""
    for batch in batches:
        names = {"input_ids", "labels", "attention_mask"} | ({"segment_ids", "position_ids"} if packed else set())
        assert batch.keys() == names
        assert {(array.dtype, array.shape) for array in batch.values()} == {(np.dtype(np.int32), (3, 12))}
        for ids, labels, mask, *rest in zip(*(batch[name] for name in sorted(names, key=ORDER.index)), strict=True):
            used = int(mask.sum())
            assert mask.tolist() == [1] * used + [0] * (12 - used)
            assert (ids[used:] == PAD).all()
            assert (labels[used:] == IGNORED).all()
            segments, positions = rest or (mask, np.arange(12) * mask)
            assert (segments[used:] == 0).all()
            assert (positions[used:] == 0).all()
            counts = np.bincount(segments[:used], minlength=1)
            assert segments[:used].tolist() == np.repeat(np.arange(len(counts)), counts).tolist()
            windows = []
            for segment in range(1, len(counts)):
                place = np.flatnonzero(segments == segment)
                assert positions[place].tolist() == list(range(len(place)))
                windows.append((ids[place], labels[place]))
            yield windows


ORDER = ["input_ids", "labels", "attention_mask", "segment_ids", "position_ids"]


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS,
    st.sampled_from(["split", "right"]),
    st.sampled_from(["overlap", "bos"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)
def test_every_token_is_learned_once_behind_its_predecessor(lengths, truncate, start, packing, shuffle, seed):
    texts = unique_texts(lengths)
    config = config_of(packing=packing, shuffle=shuffle, seed=seed, truncate=truncate, window_start=start)
    documents = [[BEGIN, *map(ord, text), END] for text in texts]
    expected = documents if truncate == "split" else [document[:12] for document in documents]
    before = {token: (document[place - 1], number) for number, document in enumerate(expected)
              for place, token in enumerate(document) if place and token != END}  # fmt: skip
    learned, ends = [], 0
    for windows in rows_of(batches_of(texts, config), packing):
        assert packing or len(windows) <= 1
        for ids, labels in windows:
            assert labels[0] == IGNORED
            assert (labels[1:] == ids[1:]).all()
            owners = {before[token][1] for token in ids.tolist() if token in before}
            assert len(owners) <= 1
            for place in range(1, len(ids)):
                token, previous = int(ids[place]), int(ids[place - 1])
                begins_anew = start == "bos" and place == 1 and previous == BEGIN
                if token == END:
                    assert previous in before or begins_anew
                    ends += 1
                    continue
                learned.append(token)
                assert previous == before[token][0] or begins_anew
    assert sorted(learned) == sorted(before)
    assert ends == sum(document[-1] == END for document in expected)


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.booleans(), st.integers(1, 2), st.integers(0, 100), st.sampled_from(["split", "right"]))
def test_it_goes_on_from_any_batch(lengths, packing, epochs, share, truncate):
    texts = unique_texts(lengths)
    config = config_of(packing=packing, epochs=epochs, truncate=truncate)
    options = dict(batch_size=2, config=config, drop_remainder=False)
    loader = make_loader(texts, TOKENIZER, **options)
    states, batches = [loader.get_state()], []
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.get_state())))
    at = share * len(batches) // 100
    other = make_loader(texts, TOKENIZER, **options)
    for _ in range(share % 3):  # where it stood does not matter
        next(other, None)
    other.set_state(states[at])
    assert other.get_state() == states[at]
    rest = list(other)
    assert len(rest) == len(batches) - at
    for ours, theirs in zip(rest, batches[at:], strict=True):
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert other.statistics == loader.statistics
    assert (other.position, other.epoch) == (epochs * len(texts), epochs)
    other.set_state(states[0])  # from the end to the beginning
    assert len(list(other)) == len(batches)


@settings(deadline=None, max_examples=15)
@given(LENGTHS, st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_processes_make_the_shares_of_one_batch(lengths, count, packing):
    texts, config = unique_texts(lengths), config_of(packing=packing)
    whole = batches_of(texts, config, 6)
    shares = [batches_of(texts, config, 6, process_index=index, process_count=count) for index in range(count)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            assert (np.concatenate([part[name] for part in parts]) == array).all()


@pytest.mark.parametrize("drop", [True, False])
def test_the_number_of_batches_is_known_where_it_can_be(drop):
    texts = unique_texts([3, 30, 5, 7, 2])
    for changes in ({"packing": False, "truncate": "right"}, {"packing": True}, {"packing": False}, {"epochs": None}):
        loader = make_loader(texts, TOKENIZER, batch_size=2, config=config_of(**changes), drop_remainder=drop)
        if changes.get("truncate"):
            assert loader.batch_count == len(list(loader)) == (2 if drop else 3)
        else:
            assert loader.batch_count is None


def test_a_state_serves_another_number_of_processes():
    texts, config = unique_texts([5, 9, 20, 3, 7, 11, 2, 30]), config_of(epochs=None)
    one = make_loader(texts, TOKENIZER, batch_size=4, config=config)
    for _ in range(3):
        next(one)
    two = [make_loader(texts, TOKENIZER, batch_size=4, config=config, process_index=i, process_count=2) for i in (0, 1)]
    for loader in two:
        loader.set_state(one.get_state())
    batch = next(one)
    assert (np.concatenate([next(loader)["input_ids"] for loader in two]) == batch["input_ids"]).all()


def test_passes_have_orders_of_their_own_and_see_everything_once():
    texts = unique_texts([1] * 40)
    loader = make_loader(texts, TOKENIZER, batch_size=10, config=config_of(packing=False, epochs=None))
    passes = [np.concatenate([next(loader)["input_ids"][:, 1] for _ in range(4)]) for _ in range(3)]
    assert loader.epoch == 3
    for order in passes:
        assert sorted(order) == sorted(map(ord, "".join(texts)))
    assert len({tuple(order) for order in passes}) == 3
    other = make_loader(texts, TOKENIZER, batch_size=10, config=config_of(packing=False, epochs=None, seed=1))
    assert (next(other)["input_ids"][:, 1] != passes[0][:10]).any()
    still = make_loader(texts, TOKENIZER, batch_size=10, config=config_of(packing=False, shuffle=False))
    assert [int(token) for token in next(still)["input_ids"][:, 1]] == [ord(text) for text in texts[:10]]


def test_a_thread_ahead_changes_nothing():
    texts, config = unique_texts([5, 9, 20, 3, 7, 11, 2, 30] * 3), config_of(epochs=3, prefetch=3)
    plain = batches_of(texts, replace(config, prefetch=0))
    with make_loader(texts, TOKENIZER, batch_size=3, config=config, drop_remainder=False) as loader:
        batches = []
        for number, batch in enumerate(loader):
            batches.append(batch)
            if number == 4:
                loader.set_state(loader.get_state())
    assert len(batches) == len(plain)
    assert all((ours["input_ids"] == theirs["input_ids"]).all() for ours, theirs in zip(batches, plain, strict=True))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_new_process_goes_on(tmp_path):
    """Which also leaves its loader open, with a thread at work, when it ends."""
    texts = unique_texts([5, 9, 20, 3, 7, 11, 2, 30])
    loader = make_loader(texts, TOKENIZER, batch_size=2, config=config_of(epochs=None))
    for _ in range(7):
        next(loader)
    (tmp_path / "state.json").write_text(json.dumps(loader.get_state()))
    program = f"""
import json
from pathlib import Path
from easydel.training.data import DataConfig, make_loader
from tests.training.letters import LetterTokenizer, unique_texts
config = DataConfig(sequence_length=12, packing_rows=3, prefetch=2)
loader = make_loader(unique_texts({list(map(len, texts))}), LetterTokenizer(), batch_size=2, config=config)
loader.set_state(json.loads(Path({str(tmp_path / "state.json")!r}).read_text()))
print(json.dumps([next(loader)["labels"].tolist() for _ in range(9)]))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [next(loader)["labels"].tolist() for _ in range(9)]


def test_statistics_count_what_happened():
    texts = unique_texts([5, 30, 8])  # with begin and end 7, 32 and 10 tokens
    loader = make_loader(
        texts, TOKENIZER, batch_size=2, config=config_of(truncate="right", shuffle=False), drop_remainder=False
    )
    list(loader)
    tokens = 7 + 12 + 10
    expected = Statistics(documents=3, dropped_tokens=20, rows=3, tokens=tokens, labels=tokens - 3, padding=36 - tokens)
    assert loader.statistics == expected
    assert loader.statistics.padding_share == pytest.approx((36 - tokens) / 36)
    assert "3 documents" in str(loader.statistics)


def test_padding_is_small_for_documents_of_common_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(2.0, 0.9, 500).astype(int), 1, 62).tolist()
    config = DataConfig(sequence_length=64, epochs=1, prefetch=0)
    loader = make_loader(unique_texts(lengths), TOKENIZER, batch_size=4, config=config)
    list(loader)
    assert loader.statistics.padding_share < 0.03  # measured: about 1%; one row a document would leave 80%


def test_states_of_other_data_are_refused():
    texts, config = unique_texts([5, 9, 20]), config_of()
    make = lambda texts=texts, tokenizer=TOKENIZER, batch_size=2, **changes: make_loader(  # noqa: E731
        texts, tokenizer, batch_size=batch_size, config=replace(config, **changes)
    )
    state = make().get_state()

    class Other(LetterTokenizer):
        def encode(self, text, add_special_tokens=True, verbose=True):
            return [token + 5 for token in super().encode(text, add_special_tokens, verbose)]

    for loader, message in (
        (make(seed=1), "settings: seed was 0, now it is 1"),
        (make(sequence_length=14), "sequence_length was 12"),
        (make(texts[:2]), "data: records was 3, now it is 2"),
        (make(tokenizer=Other()), "first_document"),
        (make(batch_size=3), "batch_size was 2, now it is 3"),
    ):
        before = loader.get_state()
        with pytest.raises(ValueError, match=message):
            loader.set_state(state)
        assert loader.get_state() == before
    damaged = state | {"stream": {"position": 3}}
    with pytest.raises(ValueError, match="the state is damaged: 'stream' must have position, window"):
        make().set_state(damaged)
    with pytest.raises(ValueError, match="version"):
        make().set_state({"position": 3})
    make(epochs=5, prefetch=1).set_state(state)  # these change nothing of what comes


def test_too_few_rows_for_a_batch_are_no_silent_end():
    with pytest.raises(ValueError, match="1 rows of 12 tokens, fewer than one batch of 8"):
        next(make_loader(["abc"], TOKENIZER, batch_size=8, config=config_of()))
    (batch,) = batches_of(["abc"], config_of())
    assert batch["attention_mask"].sum() == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of process_count=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "process_count": 2, "process_index": 2}, r"process_index must be in \[0, 2\)"),
    ],
)
def test_shares_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(["abc"], TOKENIZER, config=config_of(), **options)
