"""`generate_many`: each answer is that of its prompt alone, in few programs and flat memory."""

from __future__ import annotations

import gc
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import CompilationCounter, UnsupportedError
from tests.caching.test_mixed_caches import CONFIG, MixedLM
from tests.generation.tiny import VOCAB, forgetful, llama

RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(1, VOCAB, int(length)) for length in RNG.integers(1, 90, 24)]
LIMITS = [int(limit) for limit in RNG.integers(1, 60, 24)]


def alone(model: Any, prompt: np.ndarray, limit: int, **options: Any) -> np.ndarray:
    return np.asarray(model.generate(prompt[None], max_new_tokens=limit, **options).sequences)[0, len(prompt) :]


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"eos_token_id": [3, 5], "suppress_tokens": [2]}]
)
def test_each_answer_is_that_of_its_prompt_alone(options: dict[str, Any]) -> None:
    got = llama().generate_many(PROMPTS, max_new_tokens=LIMITS, batch_size=4, **options)
    for prompt, limit, answer in zip(PROMPTS, LIMITS, got, strict=True):
        np.testing.assert_array_equal(answer, alone(llama(), prompt, limit, **options))
    if "eos_token_id" in options:
        assert any(len(answer) < limit for answer, limit in zip(got, LIMITS, strict=True)), "no row ended early"


def test_draws_are_those_of_the_prompt_s_seed() -> None:
    options = {"temperature": 1.3, "top_k": 12}
    counted = llama().generate_many(PROMPTS[:8], max_new_tokens=12, batch_size=3, seed=5, **options)
    named = llama().generate_many(PROMPTS[:8], max_new_tokens=12, batch_size=4, seed=list(range(5, 13)), **options)
    for place, (one, other) in enumerate(zip(counted, named, strict=True)):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, alone(llama(), PROMPTS[place], 12, seed=5 + place, **options))


def test_recurrent_full_and_sliding_layers() -> None:
    model = MixedLM(CONFIG, rngs=nnx.Rngs(0))
    got = model.generate_many(PROMPTS[:3], max_new_tokens=LIMITS[:3], batch_size=2)
    for prompt, limit, answer in zip(PROMPTS, LIMITS, got, strict=False):
        np.testing.assert_array_equal(answer, alone(model, prompt, limit))


@pytest.mark.parametrize("make", [llama, lambda: MixedLM(CONFIG, rngs=nnx.Rngs(0))], ids=["attention", "mixed layers"])
def test_short_prompts_are_read_beside_answers(make: Any) -> None:
    """Some of as many tokens as there are rows, which are fed a token a step; some longer, which are not."""
    model, options = make(), {"eos_token_id": [3, 5]}
    prompts = [prompt[:length] for prompt, length in zip(PROMPTS, [1, 4, 9, 2, 3, 4, 1], strict=False)]
    limits = [9, 1, 6, 30, 2, 12, 1]
    got = model.generate_many(prompts, max_new_tokens=limits, batch_size=4, **options)
    for prompt, limit, answer in zip(prompts, limits, got, strict=True):
        np.testing.assert_array_equal(answer, alone(model, prompt, limit, **options))


def test_a_cache_that_is_used_up_is_moved() -> None:
    """Two rows make 12 · 60 tokens, many times the spare slots."""
    got = llama().generate_many(PROMPTS[:12], max_new_tokens=60, batch_size=2, cache_implementation="quantized")
    for prompt, answer in zip(PROMPTS, got, strict=False):
        np.testing.assert_array_equal(answer, alone(llama(), prompt, 60, cache_implementation="quantized"))


def test_layers_in_a_scan(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    model = easydel.LlamaForCausalLM.from_pretrained(tmp_path, scan_layers=True)
    got = model.generate_many(PROMPTS[:6], max_new_tokens=LIMITS[:6], batch_size=3)
    for prompt, limit, answer in zip(PROMPTS, LIMITS, got, strict=False):
        np.testing.assert_array_equal(answer, alone(llama(), prompt, limit))


def test_answers_come_as_they_end() -> None:
    found = list(llama().iterate_many(PROMPTS[:3], max_new_tokens=[30, 2, 9], batch_size=3))
    assert [place for place, _ in found] == [1, 2, 0]
    assert [len(answer) for _, answer in found] == [2, 9, 30]
    assert llama().generate_many([]) == []


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended))


def test_200_prompts_alone_in_flat_memory_and_no_more_programs() -> None:
    prompts = [RNG.integers(1, VOCAB, int(length)) for length in RNG.integers(1, 90, 200)]
    limits = RNG.integers(1, 40, 200)
    list(llama().iterate_many(PROMPTS, max_new_tokens=40))
    used, answers = [], {}
    gc.freeze()  # what other tests left need not be walked 200 times
    try:
        with CompilationCounter() as counter:
            for place, answer in llama().iterate_many(prompts, max_new_tokens=limits):
                used.append(live_bytes())
                answers[place] = answer
    finally:
        gc.unfreeze()
    assert len(used) == 200
    assert counter.count <= 1  # the first time that a cache is moved
    assert max(used[100:]) <= max(used[:100]), "live arrays grow with the number of prompts"
    for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        np.testing.assert_array_equal(answers[place], alone(llama(), prompt, int(limit)))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"repetition_penalty": 1.2}, UnsupportedError, "repetition_penalty=1.2"),
        ({"num_beams": 2}, UnsupportedError, "num_beams=2"),
        ({"top_q": 2}, UnsupportedError, "top_q"),
        ({"max_new_tokens": [1]}, ValueError, "max_new_tokens has 1 numbers, there are 2"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        llama().generate_many(PROMPTS[:2], **options)


def test_prompts_are_checked_first() -> None:
    with pytest.raises(ValueError, match=r"prompt 1: token ids must lie"):
        llama().generate_many([[1, 2], [VOCAB]])
    with pytest.raises(UnsupportedError, match="takes no cache"):
        forgetful().generate_many(PROMPTS[:2])
