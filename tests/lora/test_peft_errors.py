"""Adapters that do not fit, or are broken: clear errors before anything is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from easydel import LoraConfig
from easydel.errors import CheckpointError, UnsupportedError
from easydel.lora.peft_config import REFUSED, WITHOUT_EFFECT, PeftConfig
from tests.lora.peft_models import peft_of
from tests.lora.tiny import arrays_of, assert_unharmed
from tests.models.pairs import pair
from tests.models.table import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PREFIX = "base_model.model.model.layers.0.self_attn"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def config_with(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "REMOVED"}))


def tensors_with(folder: Path, **changed: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {f"{PREFIX}.{name.replace('__', '.')}": value for name, value in changed.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def refused(case: Any, folder: Any, *messages: str, error: type[Exception] = CheckpointError) -> None:
    """Assert that loading is refused, with all that these say, and that the model is as before."""
    model = nnx.clone(case.ours)
    before = arrays_of(model)
    with pytest.raises(error) as caught:
        model.load_adapter(folder)
    for message in messages:
        assert message in str(caught.value), str(caught.value)
    assert_unharmed(model, before)
    assert not model.adapter_names


def test_every_field_of_peft_s_config_is_known() -> None:
    from dataclasses import MISSING, fields

    known = {each.name for each in fields(PeftConfig)} | {*WITHOUT_EFFECT} | {*REFUSED}
    theirs = {each.name: each for each in fields(peft.LoraConfig)}
    assert theirs.keys() - {"runtime_config"} <= known
    for name, idle in REFUSED.items():  # what asks for nothing is PEFT's default
        each = theirs[name]
        default = each.default if each.default is not MISSING else each.default_factory()  # type: ignore[misc]
        assert any(default == value for value in idle), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"megatron_config": {}}, "megatron_config={}"),
        ({"corda_config": {"x": 1}}, "corda_config="),
        ({"eva_config": {}, "alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1], eva_config={}"),
        ({"loftq_config": {"bits": 4}}, "loftq_config="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
        ({"from_the_future": 1}, "not known here are not supported: from_the_future=1"),
    ],
)
def test_what_peft_offers_and_we_do_not_is_named(case: Any, folder: Path, fields: Any, message: str) -> None:
    config_with(folder, **fields)
    refused(case, folder, message, "adapter_config.json", error=UnsupportedError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "8"}, "r='8': expected an integer of at least 1"),
        ({"r": 0, "lora_alpha": None}, "lora_alpha=None: expected a finite number\n  r=0"),
        ({"use_dora": 1}, "use_dora=1: expected true or false"),
        ({"target_modules": [1]}, "target_modules=[1]: expected a list of names or a regular expression"),
        ({"target_modules": "q_proj("}, "target_modules='q_proj('"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern={'q_proj': 0}"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': expected a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform=['1']"),
        ({"peft_type": "REMOVED"}, "peft_type=None"),
        ({"target_modules": ["k_porj"]}, "mean no layer of this model that can be adapted"),
        ({"target_modules": "REMOVED"}, "mean no layer of this model"),
    ],
)
def test_values_that_cannot_be_used_are_named(case: Any, folder: Path, fields: Any, message: str) -> None:
    config_with(folder, **fields)
    refused(case, folder, message)


def test_a_null_field_of_a_newer_version_is_warned_of(case: Any, folder: Path) -> None:
    config_with(folder, from_the_future=None)
    with pytest.warns(UserWarning, match="newer version of PEFT; its fields from_the_future"):
        assert nnx.clone(case.ours).load_adapter(folder).adapter_names == ["default"]


def test_tensors_that_do_not_fit_are_listed_together(case: Any, folder: Path) -> None:
    width = case.hf.config.hidden_size
    tensors_with(
        folder,
        q_proj__lora_A__weight=None,
        q_proj__lora_B__weight=np.zeros((width, 5), np.float32),
        v_proj__lora_A__weight=np.zeros((4, width), np.int32),
        k_proj__lora_A__weight=np.zeros((4, width), np.float32),
        z_proj__lora_A__weight=np.zeros((4, width), np.float32),
        v_proj__lora_magnitude_vector=np.zeros(4, np.float32),
    )
    refused(
        case, folder, "(6 problems)", "missing     ", "shape       ", "dtype       ", "no such layer here",
        "the config does not mean this layer", "the config asks for no such tensor", f"float32[{width}, 5]",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "float[8, "),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, "the config does not mean this layer"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "self_attn.o_proj.lora_A.weight"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"modules_to_save": ["no_head"]}, "modules_to_save=['no_head']"),
    ],
)
def test_config_and_tensors_are_held_against_each_other(case: Any, folder: Path, fields: Any, message: str) -> None:
    config_with(folder, **fields)
    refused(case, folder, message, "the checkpoint does not fit")


def test_broken_files_are_named(case: Any, folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(content[:-10])
    refused(case, folder, "adapter_model.safetensors", "truncated")
    weights.write_bytes(content)
    config.write_text(text[:-5])
    refused(case, folder, "adapter_config.json", "not valid JSON")
    config.write_text("[]")
    refused(case, folder, "expected a JSON object")
    config.write_text(text)
    weights.unlink()
    refused(case, folder, "neither adapter_model.safetensors nor adapter_model.bin")
    (tmp_path / "empty").mkdir()
    refused(case, tmp_path / "empty", "no adapter: expected adapter_config.json")
    refused(case, tmp_path / "nowhere", "no such directory")


def test_an_adapter_of_another_shape_or_family_is_refused(saved: Path) -> None:
    refused(pair("gpt2", FAMILIES["gpt2"].main.name), saved, "mean no layer of this model")
    refused(pair("llama", FAMILIES["llama"].main.name, num_hidden_layers=1), saved, "no such layer here")
    other = pair("llama", FAMILIES["llama"].main.name, hidden_size=64)
    refused(other, saved, "float[4, 64]", f"{PREFIX}.q_proj.lora_A.weight")


def test_another_base_of_the_same_shape_is_warned_of(case: Any, folder: Path) -> None:
    config_with(folder, base_model_name_or_path="org/another")
    with pytest.warns(UserWarning, match="trained on 'org/another', and this model was loaded from"):
        nnx.clone(case.ours).load_adapter(folder)
    config_with(folder, base_model_name_or_path=f"elsewhere/{Path(case.folder).name}")
    nnx.clone(case.ours).load_adapter(folder)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_base_s_tensor_in_the_file_must_be_the_model_s(case: Any, tmp_path: Path) -> None:
    peft_of(case, target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "base_layer" in name)
    save_file(tensors | {name: tensors[name] + 1}, file)
    refused(case, tmp_path, name, "this model has other numbers there")


def test_names_that_are_taken_and_folded_adapters_are_refused(case: Any, saved: Path) -> None:
    model = nnx.clone(case.ours).load_adapter(saved)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.load_adapter(saved)
    with pytest.raises(ValueError, match="expected a name without '/'"):
        model.load_adapter(saved, "a/b")
    model.load_adapter(saved, "second").merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        model.load_adapter(saved, "third")
    assert model.unmerge_adapter().adapter_names == ["default", "second"]


def test_saving_says_what_it_cannot(case: Any, tmp_path: Path) -> None:
    model = nnx.clone(case.ours)
    with pytest.raises(ValueError, match="has no adapter"):
        model.save_adapter(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model.add_adapter("default", LoraConfig(rank=2, pattern="q_proj"))
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        model.save_adapter(tmp_path / "none", "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_adapter(tmp_path / "file")
    gpt2 = nnx.clone(pair("gpt2", FAMILIES["gpt2"].main.name).ours)
    gpt2.apply_lora_to_layers(2, 4, "q_proj", use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA that leaves out transformer/layers/0/self_attn/k_proj"):
        gpt2.save_adapter(tmp_path / "none")
    assert not (tmp_path / "none").exists()
