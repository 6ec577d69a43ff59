"""What DeepSeek's checkpoints hold beside parameters: corrections of scores, and a module behind the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import easydel
from easydel.paths import flatten, named_variables
from tests.models.pairs import equal, load_ours, pair

BIAS = "e_score_correction_bias"


def rewritten(folder: Path, change: Any) -> Path:
    """Write the main variant's checkpoint with its tensors changed."""
    case = pair("deepseek_v3", "latent")
    tensors = change(load_file(case.folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((case.folder / "config.json").read_text())
    return folder


def test_the_correction_is_saved_and_not_trained() -> None:
    case = pair("deepseek_v3", "latent")
    assert not [path for path in flatten(case.ours.params) if BIAS in path]
    held = {path: v.get_value() for path, v in named_variables(case.ours).items() if BIAS in path}
    assert list(held) == [f"model/layers/1/mlp/gate/{BIAS}"]
    name = f"model.layers.1.mlp.gate.{BIAS}"
    equal(held.popitem()[1], case.hf.state_dict()[name].numpy())
    half = nnx.clone(case.ours).to_dtype("bfloat16")
    equal(half.to_torch()[name], case.hf.state_dict()[name])
    assert half.model.layers[1].mlp.gate(jnp.ones((1, 1, 32), jnp.bfloat16)).logits.dtype == jnp.float32


def test_without_the_correction_a_file_is_not_whole(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, lambda tensors: {name: x for name, x in tensors.items() if BIAS not in name})
    with pytest.raises(easydel.CheckpointError, match=BIAS):
        load_ours(pair("deepseek_v3", "latent").family, "causal-lm", folder)


def test_the_module_that_predicts_a_further_token_is_left_out(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"model.layers.61.eh_proj.weight": np.ones((2, 2), np.float32)}

    case = pair("deepseek_v3", "latent")
    again = load_ours(case.family, "causal-lm", rewritten(tmp_path, change))
    equal(again.model.norm.scale.get_value(), case.ours.model.norm.scale.get_value())


def test_a_balancing_loss_is_refused() -> None:
    case = pair("deepseek_v3", "latent")
    for name in ("auxiliary_loss_coefficient", "router_z_loss_coefficient"):
        with pytest.raises(easydel.UnsupportedError, match=name):
            case.ours(input_ids=case.ids(1, 3), loss_config=easydel.LossConfig(**{name: 0.1}))
