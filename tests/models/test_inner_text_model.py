"""A text model in a checkpoint of transformers' models of images gives their logits, and what is left out is named."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import easydel
from tests.models.pairs import Jitted, close, randomise, workplace

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IDS = np.random.default_rng(0).integers(4, 90, (2, 12))
BESIDE = r"left out are multi_modal_projector \(4 tensors\), vision_tower \(\d+ tensors\)"


@functools.cache
def llava(text: str, *, tied: bool = False) -> tuple[Any, Path]:
    """Return transformers' model of images around a text model, and a directory it was saved to."""
    config = transformers.AutoConfig.for_model(text, **SIZES)
    vision = transformers.CLIPVisionConfig(**TOWER)
    options = {"image_token_index": 95, "tie_word_embeddings": tied}
    whole = transformers.LlavaConfig(text_config=config, vision_config=vision, **options)
    return saved(transformers.LlavaForConditionalGeneration(whole))


def saved(model: Any) -> tuple[Any, Path]:
    folder = Path(tempfile.mkdtemp(dir=workplace().name))
    randomise(model)
    model.eval().save_pretrained(folder)
    return model, folder


def rewritten(source: Path, folder: Path, change: Any) -> Path:
    """Write the checkpoint with its table of tensors changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def renamed(old: str, new: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def same_logits(ours: Any, theirs: Any) -> None:
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS)).logits
    close(Jitted(ours)(input_ids=IDS.astype(np.int32)).logits, want, 1e-4)


def test_llama_as_llava_is_published() -> None:
    theirs, folder = llava("llama")
    assert "language_model.lm_head.weight" in load_file(folder / "model.safetensors")
    with pytest.warns(UserWarning, match=BESIDE):
        ours = easydel.LlamaForCausalLM.from_pretrained(folder)
    same_logits(ours, theirs)


def test_qwen2_whose_head_the_larger_model_ties(tmp_path: Path) -> None:
    theirs, folder = llava("qwen2", tied=True)
    assert json.loads((folder / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    with pytest.warns(UserWarning, match=BESIDE):
        ours = easydel.Qwen2ForCausalLM.from_pretrained(folder)
    assert ours.config.tie_word_embeddings
    same_logits(ours, theirs)
    ours.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.Qwen2ForCausalLM
    same_logits(ours, again)


def test_mistral_under_the_names_of_the_model_in_memory(tmp_path: Path) -> None:
    theirs, source = llava("mistral")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors |= {name: tensor.clone() for name, tensor in theirs.state_dict().items()}

    folder = rewritten(source, tmp_path, change)
    assert {"model.language_model.norm.weight", "lm_head.weight"} <= set(load_file(folder / "model.safetensors"))
    with pytest.warns(UserWarning, match=r"left out are model.multi_modal_projector \(4 tensors\), model.vis"):
        ours = easydel.MistralForCausalLM.from_pretrained(folder)
    same_logits(ours, theirs)


def test_gemma_3() -> None:
    text = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention"] * 2)
    vision = transformers.SiglipVisionConfig(**TOWER)
    tokens = {"boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    theirs, folder = saved(transformers.Gemma3ForConditionalGeneration(config))
    with pytest.warns(UserWarning, match=r"Gemma3ForCausalLM is one part of this model; left out are multi_modal_proj"):
        ours = easydel.Gemma3ForCausalLM.from_pretrained(folder)
    same_logits(ours, theirs)


def test_llama_in_smolvlm() -> None:
    sizes = {"vision_config": TOWER, "image_token_id": 95, "scale_factor": 2, "pad_token_id": 0}
    config = transformers.SmolVLMConfig(text_config={**SIZES, "model_type": "llama", "pad_token_id": 0}, **sizes)
    theirs, folder = saved(transformers.SmolVLMForConditionalGeneration(config))
    assert "model.text_model.norm.weight" in load_file(folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"left out are model.connector \(1 tensor\), model.vision_model \("):
        ours = easydel.LlamaForCausalLM.from_pretrained(folder)
    same_logits(ours, theirs)


@pytest.mark.parametrize("start", ["language_model.model.", "model.language_model.", "language_model."])
def test_the_model_without_a_head(tmp_path: Path, start: str) -> None:
    theirs, source = llava("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["language_model.lm_head.weight"]
        renamed("language_model.model.", start)(tensors)

    with pytest.warns(UserWarning, match=BESIDE):
        ours = easydel.LlamaModel.from_pretrained(rewritten(source, tmp_path, change)).to_torch()
    want = theirs.model.language_model.state_dict()
    assert ours.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith("language_model.")]:
            del tensors[name]

    folder = rewritten(llava("llama")[1], tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        easydel.LlamaForCausalLM.from_pretrained(folder)


def test_what_is_missing_or_unexpected_in_the_text_model_is_an_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["language_model.model.norm.weight"]
        tensors["language_model.model.layers.1.mlp.router.weight"] = torch.zeros(2)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)

    folder = rewritten(llava("llama")[1], tmp_path, change)
    with pytest.raises(easydel.CheckpointError) as caught:
        easydel.LlamaForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert "(3 problems)" in message
    for kind, name in (
        ("missing", "model.norm.weight"),
        ("unexpected", "model.layers.1.mlp.router.weight"),
        ("unexpected", "model.layers.7.mlp.up_proj.weight"),
    ):
        assert any(line.split()[:2] == [kind, name] for line in message.splitlines()), message
    assert "vision_tower" not in message
    assert "hold it inside a larger model" in message


def test_two_tensors_for_one_place_are_an_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.norm.weight"] = torch.zeros(32)

    folder = rewritten(llava("llama")[1], tmp_path, change)
    with pytest.raises(easydel.CheckpointError, match=r"are both 'model.norm.weight' of the model inside"):
        easydel.LlamaForCausalLM.from_pretrained(folder)


def test_the_family_must_be_the_one_inside() -> None:
    _, folder = llava("llama")
    with pytest.raises(easydel.CheckpointError, match="is for model_type 'llava'"):
        easydel.MistralForCausalLM.from_pretrained(folder)
    with pytest.raises(
        easydel.UnsupportedError, match=r"'llava' is not supported.*Parts of it.*'text_config' \(llama\)"
    ):
        easydel.AutoEasyDeLModelForCausalLM.from_pretrained(folder)


def test_two_parts_of_one_model_type_are_an_error(tmp_path: Path) -> None:
    content = json.loads((llava("llama")[1] / "config.json").read_text())
    content["draft_config"] = content["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(easydel.CheckpointError, match="'text_config', 'draft_config' are all of model_type 'llama'"):
        easydel.LlamaForCausalLM.from_pretrained(tmp_path)
