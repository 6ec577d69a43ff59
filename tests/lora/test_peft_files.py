"""Adapters in PEFT's files, both ways: each library computes what the other one saved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flax import nnx

from tests.lora.peft_models import FORWARD, loaded, our_logits, peft_of, reloaded, same_files, their_logits, tree_of
from tests.lora.tiny import randomise
from tests.models.pairs import close, pair
from tests.models.table import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:embedding and head are untied"),
]
QV = ["q_proj", "v_proj"]
TIED = next(v.name for v in FAMILIES["llama"].variants if v.config.get("tie_word_embeddings"))
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What PEFT adapts of each family: not Mamba's out_proj, which it refuses, nor routers, which have no adapters here.
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss")
TARGETS: dict[str, Any] = {
    "mamba2": ["in_proj"],
    "mamba": ["in_proj", "x_proj"],
    "falcon_mamba": ["in_proj", "x_proj"],
    "jamba": ["in_proj", "x_proj", "out_proj", "q_proj"],
    **{family: ["q_proj", "o_proj"] for family in _MIXTURES},
}
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dora, rslora": ("llama", "", {"target_modules": QV, "use_dora": True, "use_rslora": True}),
    "patterns": (
        "llama",
        "",
        {
            "target_modules": QV,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 5},
        },
    ),
    "regex": ("llama", "", {"target_modules": r".*\.1\..*proj"}),
    "layers": ("llama", "", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", "", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "embedding": ("llama", "", {"target_modules": [*QV, "embed_tokens"], "lora_dropout": 0.1}),
    "head": ("llama", "", {"target_modules": [*QV, "lm_head"]}),
    "whole head": ("llama", "", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "tied": ("llama", TIED, {"target_modules": QV}),
    "tied embedding": ("llama", TIED, {"target_modules": [*QV, "embed_tokens"]}),
    "tied head": ("llama", TIED, {"target_modules": [*QV, "lm_head"]}),
    "tied, both whole": ("llama", TIED, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "fused, dora": ("gpt2", "", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "fused, whole": ("gpt2", "", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "fan_in_fan_out": True}),
    "experts": ("mixtral", "", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, down": ("mixtral", "", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
}


def both_ways(tmp_path: Any, family: str, variant: str, **options: Any) -> Any:
    """Load what PEFT saved, save it, have PEFT load that; return our model."""
    case = pair(family, variant or FAMILIES[family].main.name)
    theirs = peft_of(case, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = case.inputs(case.ids(2, 9))
    want = their_logits(theirs, inputs)
    assert np.abs(want - their_logits(case.hf, inputs)).max() > 0.1 * np.abs(want).max()  # the adapter matters
    ours = loaded(case, tmp_path / "theirs")
    close(our_logits(ours, inputs), want, FORWARD, "theirs, loaded here")
    ours.save_adapter(tmp_path / "ours")
    close(their_logits(reloaded(case, tmp_path / "ours"), inputs), want, FORWARD, "ours, loaded there")
    loaded(case, tmp_path / "ours").save_adapter(tmp_path / "again")
    same_files(tmp_path / "ours", tmp_path / "again")
    return ours


QUICK = ("gpt2", "mixtral", "t5")  # one of each kind beside the options' Llama; the others run with the slow tests
SLOW = ("layers", "excluded", "head", "whole head", "tied", "tied embedding", "tied head", "fused, whole")
SLOW += ("experts, down",)


def quick(names: Any, slow: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("family", quick(FAMILIES, FAMILIES.keys() - {*QUICK}))
def test_every_family_takes_and_gives_them(family: str, tmp_path: Any) -> None:
    task = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(FAMILIES[family].main_task)
    targets = TARGETS.get(family, "all-linear")
    both_ways(tmp_path, family, "", target_modules=targets, task_type=task, fan_in_fan_out=family == "gpt2")


@pytest.mark.parametrize("name", quick(OPTIONS, SLOW))
def test_every_option_is_read_and_written(name: str, tmp_path: Any) -> None:
    family, variant, options = OPTIONS[name]
    both_ways(tmp_path, family, variant, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_all_linear_means_what_it_means_to_peft(family: str, tmp_path: Any) -> None:
    """PEFT writes the names that it found; the word itself stands in configs written by hand."""
    case = pair(family, FAMILIES[family].main.name)
    theirs = peft_of(case, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "all-linear"}))
    loaded(case, tmp_path)  # raises for any layer too many, or too few


def test_the_files_say_what_peft_s_say(tmp_path: Any) -> None:
    options = {"target_modules": QV, "rank_pattern": {"v_proj": 2}, "use_rslora": True, "lora_dropout": 0.1}
    ours = both_ways(tmp_path, "llama", "", task_type="CAUSAL_LM", **options)
    theirs, mine = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    same = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    assert sorted(mine["target_modules"]) == sorted(theirs["target_modules"])
    assert mine["base_model_name_or_path"] == ours.config.source_directory
    assert set(mine) <= {*theirs}


def test_a_torch_file_is_read_too(tmp_path: Any) -> None:
    case = pair("llama", FAMILIES["llama"].main.name)
    theirs = peft_of(case, target_modules=QV)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    inputs = case.inputs(case.ids(2, 9))
    ours = loaded(case, tmp_path)
    close(our_logits(ours, inputs), their_logits(theirs, inputs), FORWARD)
    ours.save_adapter(tmp_path)  # what PEFT would read in its place goes
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_classifier_s_new_head_comes_with_its_adapter(tmp_path: Any) -> None:
    """PEFT has the head among modules_to_save by itself, under both names that heads have."""
    variant = next(v.name for v in FAMILIES["llama"].variants if v.config.get("pad_token_id") is not None)
    case = pair("llama", variant, "sequence-classification")
    theirs = peft_of(case, target_modules=QV, task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {"classifier", "score"}
    inputs = case.inputs(case.ids(2, 9))
    ours = loaded(case, tmp_path)
    close(our_logits(ours, inputs), their_logits(theirs, inputs), FORWARD)
    assert {"score/kernel"} == {path for path in tree_of(ours) if "lora" not in path}


def test_separate_adapters_of_a_fused_layer_are_written_as_one(tmp_path: Any) -> None:
    """Of other ranks and scales, also if one of the three has none."""
    case = pair("gpt2", FAMILIES["gpt2"].main.name)
    inputs = case.inputs(case.ids(2, 9))
    for name, pattern, ranks in (("all", "(q|k|v|up)_proj", 2 + 4 + 4), ("some", "(q|v|up)_proj", 2 + 4)):
        ours = nnx.clone(case.ours)
        ours.apply_lora_to_layers(4, 6, pattern, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7})
        randomise(ours)
        ours.save_adapter(tmp_path / name)
        theirs = reloaded(case, tmp_path / name)
        assert theirs.base_model.model.transformer.h[0].attn.c_attn.r == {"default": ranks}
        want = our_logits(ours, inputs)
        close(their_logits(theirs, inputs), want, FORWARD, name)
        close(our_logits(loaded(case, tmp_path / name), inputs), want, FORWARD, name)


def test_a_stacked_model_writes_what_a_list_of_layers_writes(tmp_path: Any) -> None:
    case = pair("gpt2", FAMILIES["gpt2"].main.name)
    peft_of(case, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True).save_pretrained(tmp_path / "theirs")
    stacked = type(case.ours).from_pretrained(case.folder, scan_layers=True).load_adapter(tmp_path / "theirs")
    ours = loaded(case, tmp_path / "theirs")
    inputs = case.inputs(case.ids(2, 9))
    close(our_logits(stacked, inputs), our_logits(ours, inputs), FORWARD)
    for name, model in (("stack", stacked), ("list", ours)):
        model.save_adapter(tmp_path / name)
    same_files(tmp_path / "stack", tmp_path / "list")
