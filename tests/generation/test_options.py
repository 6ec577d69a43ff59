"""What `generate` is asked to do: keywords over the file over defaults, and nothing ignored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

import easydel
from easydel.generation import GenerationOptions, resolve_options
from tests.generation.tiny import llama

NOTHING = SimpleNamespace()


def resolve(given: dict[str, Any], stored: dict[str, Any] | None = None, config: Any = NOTHING) -> GenerationOptions:
    return resolve_options(given, stored or {}, config, prompt_length=5)


def test_defaults() -> None:
    assert resolve({}) == GenerationOptions(max_new_tokens=20)


def test_keywords_go_over_the_file_and_the_file_over_the_config() -> None:
    config = SimpleNamespace(eos_token_id=1, pad_token_id=2)
    stored = {"temperature": 0.5, "do_sample": True, "eos_token_id": [3, 4], "max_new_tokens": 7}
    assert resolve({}, {}, config).eos_token_ids == (1,)
    got = resolve({}, stored, config)
    assert (got.temperature, got.do_sample, got.eos_token_ids, got.pad_token_id) == (0.5, True, (3, 4), 2)
    got = resolve({"temperature": 0.9, "max_new_tokens": 3, "eos_token_id": 9}, stored, config)
    assert (got.temperature, got.max_new_tokens, got.eos_token_ids) == (0.9, 3, (9,))
    assert not resolve({"do_sample": False}, stored).do_sample
    assert resolve({"temperature": None}, stored).temperature == 0.5, "None means not given"


@pytest.mark.parametrize(
    "knob",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}, {"eta_cutoff": 0.1}],
)
def test_a_sampling_knob_means_sampling(knob: dict[str, Any]) -> None:
    assert resolve(knob).do_sample
    assert not resolve(knob | {"do_sample": False}).do_sample
    assert not resolve({}, knob).do_sample, "a file says do_sample itself"


def test_lengths() -> None:
    assert resolve({"max_length": 12}).max_new_tokens == 7
    assert resolve({}, {"max_length": 12}).max_new_tokens == 7
    assert resolve({"max_new_tokens": 2}, {"max_length": 12}).max_new_tokens == 2
    with pytest.raises(ValueError, match="max_length=5 leaves no room"):
        resolve({"max_length": 5})


def test_the_padding_token_follows_the_end_of_text() -> None:
    assert resolve({"eos_token_id": [6, 7]}).pad_token_id == 6
    assert resolve({"eos_token_id": 6, "pad_token_id": 0}).pad_token_id == 0


def test_top_k_of_zero_is_off() -> None:
    assert resolve({"top_k": 0}).top_k is None
    assert resolve({"top_k": 0}, {"top_k": 50}).top_k is None


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 4, "min_new_tokens": 5},
        {"min_new_tokens": -1},
        {"min_length": 26},
        {"min_p": 1.5},
        {"typical_p": 0.0},
        {"epsilon_cutoff": 1.0},
        {"eta_cutoff": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": "much"},
        {"frequency_penalty": float("nan")},
        {"encoder_repetition_penalty": -1.0},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 2.5},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[24]]},
        {"sequence_bias": {(): 1.0}},
        {"sequence_bias": {(24,): 1.0}},
        {"suppress_tokens": [-1]},
        {"suppress_tokens": [3, 24]},
        {"begin_suppress_tokens": [24]},
        {"forced_bos_token_id": 24},
        {"forced_eos_token_id": [2, 24]},
        {"forced_bos_token_id": 2, "suppress_tokens": [2]},
        {"exponential_decay_length_penalty": (3, 1.1)},
        {"eos_token_id": 2, "exponential_decay_length_penalty": 3},
        {"eos_token_id": 2, "exponential_decay_length_penalty": (3, 0.0)},
        {"remove_invalid_values": 1},
        {"num_beams": 0},
        {"num_beams": 2, "early_stopping": "soon"},
        {"num_return_sequences": 0},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"length_penalty": 2.0},
        {"early_stopping": True},
        {"stop_strings": "x"},
        {"stop_strings": ["x", ""]},
        {"stop_strings": [3]},
        {"max_time": 0.0},
        {"logits_processor": [3]},
        {"stopping_criteria": "no"},
        {"seed": 1.5},
    ],
    ids=str,
)
def test_values_out_of_range_raise_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(bad)[-1]):
        resolve(bad, {}, SimpleNamespace(vocab_size=24))


def test_values_are_read_as_transformers_writes_them() -> None:
    stored = transformers.GenerationConfig(
        sequence_bias=[[[3, 4], 1.5]], bad_words_ids=[[1, 2]], forced_eos_token_id=7, suppress_tokens=[5],
        exponential_decay_length_penalty=[3, 1.1], eos_token_id=1, stop_strings="x", num_beams=3,
        early_stopping="never", length_penalty=0.5, num_return_sequences=2, min_length=9,
    ).to_diff_dict()  # fmt: skip
    got = resolve({"tokenizer": "a tokenizer"}, json.loads(json.dumps(stored)))
    assert got == GenerationOptions(
        sequence_bias=(((3, 4), 1.5),), bad_words_ids=((1, 2),), forced_eos_token_id=(7,), suppress_tokens=(5,),
        exponential_decay_length_penalty=(3, 1.1), eos_token_ids=(1,), stop_strings=("x",), num_beams=3,
        early_stopping="never", length_penalty=0.5, num_return_sequences=2, min_new_tokens=4, tokenizer="a tokenizer",
        pad_token_id=1,
    )  # fmt: skip
    assert resolve({"sequence_bias": {(3, 4): 1.5}}).sequence_bias == (((3, 4), 1.5),)


def test_a_cache_cannot_be_refused() -> None:
    with pytest.raises(easydel.UnsupportedError, match="use_cache=False"):
        resolve({"use_cache": False})
    assert resolve({"use_cache": True}, {"use_cache": False}) == resolve({}), "how a file would run it is no matter"


def test_what_belongs_to_a_call_is_not_read_from_a_file() -> None:
    with pytest.raises(easydel.UnsupportedError, match=r"seed=3 \(from generation_config.json\)"):
        resolve({}, {"seed": 3})


def test_least_lengths() -> None:
    assert resolve({"min_length": 12}).min_new_tokens == 7
    assert resolve({"min_length": 3}).min_new_tokens == 0
    assert resolve({"min_length": 12, "min_new_tokens": 2}).min_new_tokens == 2
    assert resolve({"min_length": 12}, {"min_new_tokens": 2}).min_new_tokens == 7, "keywords go over the file"


def test_forced_tokens_of_an_older_config_are_read() -> None:
    got = resolve({}, {}, SimpleNamespace(forced_eos_token_id=2, forced_bos_token_id=0))
    assert (got.forced_eos_token_id, got.forced_bos_token_id) == ((2,), 0)


UNSUPPORTED = [
    ("num_beam_groups", 2),
    ("diversity_penalty", 0.5),
    ("penalty_alpha", 0.6),
    ("guidance_scale", 1.5),
    ("top_h", 0.4),
    ("prompt_lookup_num_tokens", 3),
    ("output_attentions", True),
    ("prefix_allowed_tokens_fn", 1),
    ("typo_p", 1),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_what_is_not_offered_raises_by_name(name: str, value: Any) -> None:
    with pytest.raises(easydel.UnsupportedError, match=f"{name}={value}.*not supported"):
        llama().generate(np.ones((1, 3), int), **{name: value})
    with pytest.raises(easydel.UnsupportedError, match=f"{name}={value}.*generation_config.json"):
        resolve({}, {name: value})


def test_neutral_values_pass() -> None:
    assert resolve({"num_beam_groups": 1, "diversity_penalty": 0.0, "return_dict_in_generate": True}) == resolve({})
    assert resolve({"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}) == resolve({})
    everything = transformers.GenerationConfig().to_dict()
    assert resolve({}, everything) == resolve({}), "transformers' own defaults ask for nothing"


def test_an_option_of_the_file_can_be_overridden() -> None:
    assert resolve({"num_beams": 1}, {"num_beams": 4}) == resolve({})
    assert resolve({"num_beam_groups": 1}, {"num_beam_groups": 4}) == resolve({})


def test_the_file_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    stored = json.loads(file.read_text()) | {"max_new_tokens": 3}
    file.write_text(json.dumps(stored))
    model = easydel.LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.generate(np.ones((1, 4), int)).sequences.shape == (1, 7)
    file.write_text(json.dumps(stored | {"num_beam_groups": 3}))
    model = easydel.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(easydel.UnsupportedError, match=r"num_beam_groups=3 \(from generation_config.json\)"):
        model.generate(np.ones((1, 4), int))
    assert model.generate(np.ones((1, 4), int), num_beam_groups=1).sequences.shape == (1, 7)


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        (np.ones((3,), int), None, "input_ids"),
        (np.ones((1, 0), int), None, "not empty"),
        (np.ones((1, 3), float), None, "integers"),
        (np.full((1, 3), 24), None, r"\[0, 24\)"),
        (np.full((1, 3), -1), None, r"\[0, 24\)"),
        (np.ones((1, 3), int), np.ones((1, 2)), "attention_mask"),
        (np.ones((2, 3), int), np.array([[1, 1, 1], [0, 0, 0]]), "row 1"),
    ],
)
def test_prompts_that_do_not_fit_raise(ids: Any, mask: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        llama().generate(ids, attention_mask=mask)


def test_a_quantized_cache() -> None:
    quantized = {"cache_implementation": "quantized"}
    assert resolve({}).cache_dtype is None
    assert resolve(quantized).cache_dtype == resolve({}, quantized).cache_dtype == "int8"
    assert resolve(quantized | {"cache_config": {"nbits": 8}}).cache_dtype == "int8"
    assert resolve({"cache_implementation": "static"}, quantized).cache_dtype is None
    for name in ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked"):
        assert resolve({"cache_implementation": name}) == resolve({}), "a layout changes no number"


def test_other_caches_are_refused() -> None:
    theirs = {"backend": "quanto", "nbits": 4}
    for given in ({"cache_implementation": "quantized", "cache_config": theirs}, {"cache_implementation": "offloaded"}):
        with pytest.raises(easydel.UnsupportedError, match=r"nbits': 8|offered: quantized"):
            resolve(given)
        with pytest.raises(easydel.UnsupportedError, match=r"nbits': 8|offered: quantized"):
            resolve({}, given)
    with pytest.raises(ValueError, match="of cache_implementation='quantized', got None"):
        resolve({"cache_config": {"nbits": 8}})
