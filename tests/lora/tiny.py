"""Adapters with numbers that matter, and transformers' models with PEFT's adapters of the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from easydel.paths import named_variables, nest
from tests.models.pairs import Pair, pair
from tests.models.table import FAMILIES


def randomise(model: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Give every parameter of the adapters other numbers, of layers in a stack those they would have one by one."""
    variables = named_variables(model, nnx.LoRAParam)
    noise = np.random.default_rng(seed)
    tree = {}
    for path, variable in variables.items():
        drawn = scale * noise.standard_normal(variable.shape)
        held = np.asarray(variable.get_value())
        tree[path] = np.float32(held * (1 + drawn) if path.endswith("magnitude") else held + drawn)
    return model.merge_lora_params(nest(tree))


HF_NAMES = {
    "llama": lambda name: name,
    "qwen3": lambda name: name,
    "gpt2": lambda name: (
        name.replace("transformer.h.", "transformer.layers.")
        .replace("attn.c_proj", "self_attn.o_proj")
        .replace("mlp.c_fc", "mlp.up_proj")
        .replace("mlp.c_proj", "mlp.down_proj")
    ),
}
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], r"q_proj|v_proj|down_proj"),
    "qwen3": (["q_proj", "k_proj", "o_proj", "gate_proj"], r"q_proj|k_proj|o_proj|gate_proj"),
    "gpt2": (["c_attn", "c_fc"], r"(q|k|v|up)_proj"),
}


def peft_pair(family: str, **options: Any) -> tuple[Any, Any, Pair]:
    """Return PEFT's model with random adapters, ours with the same, and what both were made of.

    Args:
        family: one of `TARGETS`.
        **options: of PEFT's `LoraConfig`.
    """
    import peft

    case = pair(family, FAMILIES[family].main.name)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": True} | options
    names, pattern = TARGETS[family]
    config = peft.LoraConfig(target_modules=names, fan_in_fan_out=family == "gpt2", **settings)
    theirs = peft.get_peft_model(copy.deepcopy(case.hf), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours = nnx.clone(case.ours)
    ours.apply_lora_to_layers(
        settings["r"],
        settings["lora_alpha"],
        pattern,
        use_rslora=settings.get("use_rslora", False),
        use_dora=settings.get("use_dora", False),
    )
    tree = from_peft(family, {n: p.detach().numpy() for n, p in theirs.named_parameters() if "lora_" in n})
    ours.merge_params_dict(nest(tree))
    return theirs, ours, case


def from_peft(family: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our path → array of PEFT's arrays; a fused layer's `A` stands in each of ours."""
    found = {}
    for name, value in arrays.items():
        name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
        layer, _, kind = name.rpartition(".")
        leaf = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}[kind]
        value = value.T
        if layer.endswith("attn.c_attn"):
            parts = [value] * 3 if leaf == "a" else np.split(value, 3, axis=-1)
            base = layer.replace("transformer.h.", "transformer.layers.").replace("attn.c_attn", "self_attn.")
            layers = {f"{base}{each}_proj": part for each, part in zip("qkv", parts, strict=True)}
        else:
            layers = {HF_NAMES[family](layer): value}
        found |= {f"{path.replace('.', '/')}/lora/{leaf}": part for path, part in layers.items()}
    return found


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """Return a copy of every array of a model by path, random keys as numbers."""
    held = {}
    for path, variable in named_variables(model, by_layer=False).items():
        value = variable.get_value()
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        held[path] = np.array(jax.random.key_data(value) if is_key else value)
    return held


def assert_unharmed(model: Any, before: dict[str, np.ndarray]) -> None:
    after = arrays_of(model)
    assert after.keys() == before.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=path)
