"""Streams and streamers: the tokens of `generate`, as they are made."""

from __future__ import annotations

import gc
from threading import Thread
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from easydel import CompilationCounter
from easydel.assets import embedded_model_path
from easydel.cli.text import load_model, load_tokenizer
from easydel.generation import streaming
from easydel.generation.options import GenerationOptions
from easydel.generation.streaming import looks, settled
from easydel.generation.written import Written
from tests.generation.tiny import VOCAB, forgetful, llama

NEW = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(embedded_model_path())


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load_model(embedded_model_path())


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[np.ndarray] = []
        self.ends = 0

    def put(self, value: Any) -> None:
        assert not self.ends
        self.given.append(np.array(value.tolist()))

    def end(self) -> None:
        self.ends += 1


def not_twice(input_ids: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(scores.shape[1]) == input_ids[:, -1:], -jnp.inf, scores)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.2, "top_p": 0.9, "seed": 5}, id="sampled", marks=pytest.mark.slow),
        pytest.param({"stop_strings": ["return", "\n\n"], "repetition_penalty": 1.1}, id="stopped"),
        pytest.param({"logits_processor": [not_twice], "min_new_tokens": 3}, id="processed", marks=pytest.mark.slow),
    ],
)
def test_text_is_that_of_generate(embedded: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    ids = np.array([tokenizer.encode("def read(path):\n    ")])
    options = {"max_new_tokens": NEW, "tokenizer": tokenizer} | options
    whole = np.asarray(embedded.generate(ids, **options).sequences)[0, ids.shape[1] :]
    pieces = list(embedded.stream(ids, **options))
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)
    assert len(pieces) > 3
    assert all(isinstance(piece, str) and piece for piece in pieces)


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_streamer_is_given_what_transformers_gives(embedded: Any, batch: int) -> None:
    reference = transformers.LlamaForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    ids = np.random.default_rng(2).integers(2, 4096, (batch, 6))
    ours, theirs = Recorder(), Recorder()
    free = embedded.generate(ids, max_new_tokens=NEW).sequences
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": int(free[0, 6 + 9]), "pad_token_id": 1}
    out = embedded.generate(ids, streamer=ours, **options)
    with torch.no_grad():
        reference.generate(
            torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64), streamer=theirs, **options
        )
    assert ours.ends == theirs.ends == 1
    assert len(ours.given) == len(theirs.given) == 1 + out.sequences.shape[1] - 6
    for mine, other in zip(ours.given, theirs.given, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert batch == 2 or len(ours.given) < 1 + NEW, "it did not end early"


def test_transformers_streamers_work_as_they_are(
    embedded: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.array([tokenizer.encode("class Reader:\n")])
    whole = embedded.generate(ids, max_new_tokens=NEW).sequences
    text = tokenizer.decode(np.asarray(whole)[0, ids.shape[1] :])
    embedded.generate(ids, max_new_tokens=NEW, streamer=transformers.TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"

    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    thread = Thread(target=embedded.generate, args=(ids,), kwargs={"max_new_tokens": NEW, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    with pytest.raises(ValueError, match="only supports batch size 1"):
        embedded.generate(ids.repeat(2, 0), streamer=transformers.TextStreamer(tokenizer))


@pytest.mark.parametrize("model", [llama, pytest.param(forgetful, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*takes no cache")
def test_rows_prompts_and_answers(model: Any) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 5))
    options = {"max_new_tokens": NEW, "temperature": 1.5, "num_return_sequences": 2}
    whole = np.asarray(model().generate(ids, **options).sequences)[:, 5:]
    np.testing.assert_array_equal(np.stack(list(model().stream(ids, **options)), axis=1), whole)
    recorder = Recorder()
    model().generate(ids, streamer=recorder, **options)
    np.testing.assert_array_equal(recorder.given[0], ids)
    np.testing.assert_array_equal(np.stack(recorder.given[1:], axis=1), whole)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, ids, t: m.generate(ids, streamer=print), "put.*end"),
        (lambda m, ids, t: m.generate(ids, streamer=Recorder(), num_beams=2), "num_beams=2"),
        (lambda m, ids, t: m.stream(ids, num_beams=2), "num_beams=2"),
        (lambda m, ids, t: m.stream(ids, tokenizer="folder"), "tokenizer.*str"),
        (lambda m, ids, t: m.stream(ids.repeat(3, 0), tokenizer=t), "one answer.* 3"),
        (lambda m, ids, t: m.stream(ids, tokenizer=t, num_return_sequences=4, do_sample=True), "one answer.* 4"),
        (lambda m, ids, t: m.stream(ids, temperature=-1.0), "temperature"),
        (lambda m, ids, t: m.stream(ids, stop_strings=["x"]), "tokenizer="),
    ],
)
def test_refused_before_anything_runs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, call: Any, said: str) -> None:
    monkeypatch.setattr("easydel.generation.engine._start", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=said):
        call(llama(), np.ones((1, 3), int), tokenizer)


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_closed_stream_makes_no_more_and_keeps_nothing() -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, 5))
    whole = np.asarray(llama().generate(ids, max_new_tokens=100).sequences)[0, 5:]
    before = live_bytes()
    stream = llama().stream(ids, max_new_tokens=100)
    other = llama().stream(ids, max_new_tokens=100)
    assert live_bytes() == before, "it runs before it is asked"
    got = [int(next(stream)[0]) for _ in range(3)]
    assert int(next(other)[0]) == got[0], "streams do not meddle with each other"
    assert live_bytes() > before
    got += [int(next(stream)[0])]
    assert got == whole[:4].tolist()
    stream.close()
    other.close()
    assert live_bytes() == before
    assert list(stream) == []


def test_the_second_stream_compiles_nothing(tokenizer: Any) -> None:
    model = llama(vocab=len(tokenizer))

    def run(text: str, new: int, **options: Any) -> None:
        ids = np.array([tokenizer.encode(text)])
        list(model.stream(ids, tokenizer=tokenizer, max_new_tokens=new, **options))
        model.generate(ids, streamer=Recorder(), max_new_tokens=new, **options)

    run("x = 1", 10, temperature=0.7)
    with CompilationCounter() as counter:
        run("import os\nimport sys\n", 31, temperature=0.9, seed=3)
        run("y", 1, temperature=0.9, seed=4)
    assert counter.count == 0


class Loop:
    """A loop that takes so many seconds a token, and ends all rows with a certain one."""

    def __init__(self, seconds: float, end: int = 10**6) -> None:
        self.seconds, self.end, self.now, self.made = seconds, end, 0.0, 0
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, limit: int, is_end: bool) -> Any:
        self.calls.append((limit, is_end))
        made, self.made = self.made, min(limit, self.end)
        self.now += self.seconds * (self.made - made)
        tokens = np.arange(1000)[None].repeat(2, 0)
        written = Written(tokens, np.zeros(2, int), 7 + self.made, self.made)
        return SimpleNamespace(written=written, finished=np.full(2, self.made == self.end))


def paces(loop: Loop, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: loop.now))
    given = [steps for _, steps in settled(looks(loop, GenerationOptions(**options), 0.0), 2)]
    np.testing.assert_array_equal(np.concatenate(given), (7 + np.arange(loop.made))[:, None].repeat(2, 1))
    return [len(steps) for steps in given]


def test_fast_loops_are_looked_at_seldom_and_slow_ones_after_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paces(Loop(1e-4), monkeypatch, max_new_tokens=100) == [1, 2, 4, 8, 16, 32, 32, 5]
    assert paces(Loop(0.01), monkeypatch, max_new_tokens=20) == [1, 2, 4, 4, 4, 4, 1]
    assert paces(Loop(0.2), monkeypatch, max_new_tokens=4) == [1, 1, 1, 1]
    assert paces(Loop(1e-4, end=5), monkeypatch, max_new_tokens=100) == [1, 2, 2]


def test_only_the_last_look_is_told_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(1e-4)
    paces(loop, monkeypatch, max_new_tokens=9)
    assert loop.calls == [(1, False), (3, False), (7, False), (9, True)]
    loop = Loop(1.0)
    assert paces(loop, monkeypatch, max_new_tokens=50, max_time=2.5) == [1, 1, 1, 1]
    assert loop.calls[-1] == (4, True)
