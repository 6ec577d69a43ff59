"""The compiled loop: seeds, rows, streams, devices, and how little it compiles."""

from __future__ import annotations

import numpy as np
import pytest

import easydel
from easydel import CompilationCounter
from tests.generation.tiny import VOCAB, llama

SAMPLED = {"max_new_tokens": 10, "temperature": 1.3, "top_k": 12}


def prompt(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


def test_the_seed_decides() -> None:
    ids = prompt(2, 5)
    one, same, other = (np.asarray(llama().generate(ids, seed=seed, **SAMPLED).sequences) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert one.dtype == np.int32
    np.testing.assert_array_equal(one[:, :5], ids)


def test_rows_of_one_prompt_differ_when_sampled() -> None:
    tokens = np.asarray(llama().generate(prompt(1, 5).repeat(4, 0), **SAMPLED).sequences)
    assert len(np.unique(tokens, axis=0)) == 4


def test_a_row_s_draws_do_not_depend_on_its_neighbours() -> None:
    ids = prompt(3, 6)
    together = np.asarray(llama().generate(ids, **SAMPLED).sequences)
    alone = np.asarray(llama().generate(ids[:1], **SAMPLED).sequences)
    np.testing.assert_array_equal(together[0], alone[0])
    padded, mask = np.concatenate([np.zeros((3, 2), int), ids], axis=1), np.ones((3, 8), int)
    mask[:, :2] = 0
    np.testing.assert_array_equal(
        llama().generate(padded, attention_mask=mask, **SAMPLED).sequences[:, 8:], together[:, 6:]
    )


@pytest.mark.parametrize("options", [SAMPLED, {"max_new_tokens": 10, "do_sample": False}])
def test_stream_equals_generate(options: dict) -> None:
    ids = prompt(2, 5)
    free = np.asarray(llama().generate(ids, **options).sequences)[:, 5:]
    ends = {"eos_token_id": [int(free[0, 3]), int(free[1, 6])], "pad_token_id": 0}
    for extra in ({}, ends):
        want = np.asarray(llama().generate(ids, **options, **extra).sequences)[:, 5:]
        steps = list(llama().stream(ids, **options, **extra))
        assert all(step.shape == (2,) and step.dtype == np.int32 for step in steps)
        np.testing.assert_array_equal(np.stack(steps, axis=1), want)
    assert want.shape[1] < 10, "no row ended early"


def test_after_its_end_a_row_is_padding() -> None:
    ids = prompt(2, 5)
    free = np.asarray(llama().generate(ids, max_new_tokens=12).sequences)[:, 5:]
    end = next(int(t) for t in free[0] if t not in free[1])
    out = np.asarray(llama().generate(ids, max_new_tokens=12, eos_token_id=end, pad_token_id=17).sequences)[:, 5:]
    first = list(free[0]).index(end)
    np.testing.assert_array_equal(out[0], [*free[0, : first + 1], *[17] * (11 - first)])
    np.testing.assert_array_equal(out[1], free[1])


@pytest.mark.slow
def test_few_compilations_for_many_prompt_lengths() -> None:
    model = llama(vocab=26)  # of its own, so that no other test has compiled for it
    lengths = [1, 512, *np.random.default_rng(0).integers(1, 513, 23)]
    with CompilationCounter() as counter:
        for length in lengths:
            assert model.generate(prompt(1, int(length)), max_new_tokens=4).sequences.shape == (1, length + 4)
    assert 0 < counter.count <= 10, counter.count
    with CompilationCounter() as counter:
        model.generate(prompt(1, 512), max_new_tokens=4)
        model.generate(prompt(1, 47), max_new_tokens=4)
    assert counter.count == 0


def test_changing_numbers_compiles_nothing() -> None:
    ids = prompt(1, 5)
    llama().generate(ids, **SAMPLED)
    with CompilationCounter() as counter:
        llama().generate(ids, max_new_tokens=7, temperature=0.4, top_k=3, seed=9, eos_token_id=[3, 4], pad_token_id=1)
    assert counter.count == 0


def test_changed_weights_are_used() -> None:
    from flax import nnx

    model = nnx.clone(llama())
    before = np.asarray(model.generate(prompt(1, 5), max_new_tokens=8).sequences)
    kernel = model.params["lm_head"]["kernel"]
    model.merge_params_dict({"lm_head": {"kernel": -kernel}})
    assert (np.asarray(model.generate(prompt(1, 5), max_new_tokens=8).sequences) != before).any()


def test_a_changed_config_is_not_served_an_old_trace() -> None:
    from flax import nnx

    model = nnx.clone(llama())
    ids = prompt(1, 5)
    model.generate(ids, max_new_tokens=4)
    model.config.attn_mechanism = "vanilla"
    with CompilationCounter() as counter:
        model.generate(ids, max_new_tokens=4)
    assert counter.count > 0


@pytest.mark.slow
def test_beams_on_a_quantized_cache() -> None:
    ids = prompt(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 2, "cache_implementation": "quantized"}
    together = np.asarray(llama().generate(ids, **options).sequences)
    alone = np.asarray(llama().generate(ids[1:], **options).sequences)
    np.testing.assert_array_equal(together[1:], alone)


@pytest.mark.slow
def test_beams_under_a_scan(tmp_path: object) -> None:
    ids = prompt(2, 5)
    llama().save_pretrained(tmp_path)
    model = easydel.LlamaForCausalLM.from_pretrained(tmp_path, scan_layers=True)
    options = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    np.testing.assert_array_equal(model.generate(ids, **options).sequences, llama().generate(ids, **options).sequences)


@pytest.mark.parametrize("dims", [pytest.param((1, 8, 1, 1, 1), marks=pytest.mark.slow), (2, 2, 1, 2, 1)])
def test_sharded(dims: tuple[int, ...], tmp_path: object) -> None:
    ids = prompt(4, 7)
    llama().save_pretrained(tmp_path)
    model = easydel.LlamaForCausalLM.from_pretrained(tmp_path, sharding_axis_dims=dims, auto_shard_model=True)
    assert model.is_sharded
    one = SAMPLED, {"max_new_tokens": 12, "do_sample": False}
    for options in [SAMPLED | {"max_new_tokens": 6, "num_beams": 2, "do_sample": True}] if dims[0] > 1 else one:
        want = llama().generate(ids, **options).sequences
        np.testing.assert_array_equal(model.generate(ids, **options).sequences, want)
