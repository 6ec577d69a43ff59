"""Broken and hostile configs through the public API: one clear error of our own, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import easydel
from easydel.errors import CheckpointError, UnsupportedError
from tests.hub import checkpoint as ck
from tests.hub.damage import (
    Break,
    config,
    config_text,
    folder_at,
    refused,
    remote_code,
    remove,
    rope,
)

NINE = {"short_factor": [1.0] * 9, "long_factor": [1.0] * 9, "factor": 2.0}
CASES: dict[str, tuple[Break, str]] = {
    "missing": (remove("config.json"), "cannot be read .*a checkpoint needs config.json"),
    "a folder": (folder_at("config.json"), "not a regular file"),
    "empty": (config_text(b""), "not valid JSON"),
    "not JSON": (config_text(b"model_type: llama"), "not valid JSON"),
    "cut": (config_text(json.dumps(ck.CONFIG).encode()[:-20]), "not valid JSON"),
    "binary": (config_text(bytes(range(256))), "not valid JSON"),
    "a list": (config_text(b"[1]"), "expected a JSON object"),
    "40 MB": (config_text(b" " * (40 << 20)), "allowed"),
    "name twice": (config_text(b'{"model_type": "llama", "model_type": "qwen2"}'), "twice"),
    "unknown model_type": (config(model_type="evil"), "evil.*not supported"),
    "model_type a number": (config(model_type=3), "model_type"),
    "hidden_size abc": (config(hidden_size="abc"), "hidden_size is 'abc', expected a whole number"),
    "hidden_size null": (config(hidden_size=None), "hidden_size"),
    "hidden_size negative": (config(hidden_size=-8), "hidden_size is -8"),
    "hidden_size 0": (config(hidden_size=0), "hidden_size is 0"),
    "hidden_size a list": (config(hidden_size=[8]), "hidden_size"),
    "hidden_size true": (config(hidden_size=True), "hidden_size is True"),
    "hidden_size 8.5": (config(hidden_size=8.5), "hidden_size is 8.5"),
    "hidden_size NaN": (config(hidden_size=float("nan")), "hidden_size is nan"),
    "hidden_size 10^30": (config(hidden_size=10**30), "hidden_size"),
    "hidden_size 10^12": (config(hidden_size=10**12), "head_dim"),
    "heads 0": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads do not divide the width": (config(num_attention_heads=3), "hidden size .8. is not a multiple"),
    "key heads do not divide": (config(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads is 3"),
    "key heads 0": (config(num_key_value_heads=0), "num_key_value_heads is 0"),
    "head_dim odd": (config(head_dim=3), "head_dim is 3, expected an even"),
    "head_dim 10^10": (config(head_dim=10**10), "head_dim"),
    "vocab_size negative": (config(vocab_size=-1), "vocab_size is -1"),
    "layers negative": (config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "layers a string": (config(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "epsilon negative": (config(rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    "epsilon a string": (config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    "initializer infinite": (config(initializer_range=float("inf")), "initializer_range is inf"),
    "positions null": (config(max_position_embeddings=None), "max_position_embeddings"),
    "tied by a string": (config(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "unknown activation": (config(hidden_act="evil"), "activation 'evil' is not supported"),
    "activation null": (config(hidden_act=None), "hidden_act"),
    "unknown rope type": (rope("evil"), "rope_type 'evil' is not supported"),
    "rope a list": (config(rope_parameters=[1]), r"rope_parameters is \[1\], expected an object"),
    "rope_scaling a string": (config(rope_scaling="linear"), "rope_scaling is 'linear'"),
    "linear without factor": (rope("linear"), "factor"),
    "linear factor 0": (rope("linear", factor=0.0), "factor"),
    "linear factor a string": (rope("linear", factor="2"), "factor is '2', expected a finite number"),
    "yarn without factor": (rope("yarn"), "factor"),
    "yarn factor NaN": (rope("yarn", factor=float("nan")), "factor is nan"),
    "llama3 without its frequencies": (rope("llama3", factor=8.0), "freq_factor"),
    "longrope of the wrong length": (rope("longrope", **NINE), "short_factor"),
    "theta 0": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta is 0"),
    "theta a string": (config(rope_theta="10000"), "rope_theta is '10000'"),
    "theta infinite": (config(rope_theta=float("inf")), "rope_theta is inf"),
    "dropout a string": (config(attention_dropout="no"), "attention_dropout is 'no'"),
    "code of its own": (remote_code, "evil.*not supported"),
    "generation config broken": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
    "generation config a list": (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_refused(tmp_path: Path, case: str) -> None:
    folder = ck.write(tmp_path / "model")
    damage, words = CASES[case]
    damage(folder)
    refused(folder, words)


def test_unknown_model_type_through_auto(tmp_path: Path) -> None:
    folder = ck.write(tmp_path, model_type="evil")
    for loader in (easydel.AutoEasyDeLModelForCausalLM, easydel.AutoEasyDeLConfig):
        with pytest.raises(UnsupportedError, match=r"'evil' is not supported.*llama"):
            loader.from_pretrained(folder)


def test_a_config_without_model_type_serves_a_named_class_only(tmp_path: Path) -> None:
    folder = ck.write(tmp_path)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in ck.CONFIG.items() if k != "model_type"}))
    ck.assert_equal(easydel.LlamaForCausalLM.from_pretrained(folder), ck.tensors())
    with pytest.raises(CheckpointError, match="no model_type"):
        easydel.AutoEasyDeLModelForCausalLM.from_pretrained(folder)
