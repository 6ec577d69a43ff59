"""A model's adapter as PEFT's config and tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.save import host_array
from easydel.hub.weight_map import Link
from easydel.lora.config import LoraConfig
from easydel.lora.describe import usual
from easydel.lora.named import Adapter, get_adapter
from easydel.lora.peft_match import PREFIX, nested_names
from easydel.lora.peft_names import PeftLayer, memory_links, peft_layers
from easydel.lora.peft_targets import ends_in, is_saved_name
from easydel.lora.peft_tensors import PeftTensors, alpha_for, to_tensors
from easydel.stacked import layer_paths


def adapter_content(
    module: nnx.Module, name: str | None, about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the content of an adapter's config and its tensors by name.

    Args:
        module: the model.
        name: of the adapter, the active one if `None`.
        about: further fields of the config.

    Raises:
        ValueError: there is no such adapter.
        UnsupportedError: PEFT cannot hold it; the layers are named.
    """
    adapter = get_adapter(module, name)
    links = memory_links(module)
    layers = peft_layers(module, links)
    made = _tensors_of(adapter, layers)
    prefixes = nested_names({each: layers[each] for each in made})
    tensors = {
        f"{PREFIX}{prefixes[each]}.{end}": array for each, found in made.items() for end, array in found.tensors.items()
    }
    saved = _saved_tensors(adapter, links)
    names = list(dict.fromkeys(tensor.rpartition(".")[0] for tensor in saved))
    config = _config_of(adapter, made, layers, [each for link in links for each in link.sources], names)
    return config | dict(about), tensors | {f"{PREFIX}{each}": array for each, array in saved.items()}


def _tensors_of(adapter: Adapter, layers: Mapping[str, PeftLayer]) -> dict[str, PeftTensors]:
    owner = {path: layer for layer in layers.values() for path in layer.paths}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for stored, arrays in adapter.arrays.items():
        for name, array in arrays.items():
            for path, one in _by_layer(stored, array).items():
                parts.setdefault(path, {})[name] = one
    if lost := [path for path in parts if path not in owner]:
        raise UnsupportedError(
            f"save_adapter: PEFT has no layer for {', '.join(lost[:3])} ({len(lost)} in all): adapters of layers whose "
            "weight is no plain matrix in transformers' model are not supported in its files; merge_and_unload() and "
            "save_pretrained() write the whole model"
        )
    adapted = dict.fromkeys(owner[path].name for path in parts)
    return {name: to_tensors(layers[name], [parts.get(path) for path in layers[name].paths]) for name in adapted}


def _by_layer(stored: str, array: Any) -> dict[str, np.ndarray]:
    """Return path of each layer → its part of what is stored under a path, on the host."""
    whole, paths = host_array(array), layer_paths(stored)
    return {stored: whole} if paths is None else dict(zip(paths, whole, strict=True))


def _saved_tensors(adapter: Adapter, links: Collection[Link]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for stored, array in adapter.saved.items():
        arrays |= _by_layer(stored, array)
    found: dict[str, np.ndarray] = {}
    for link in links:
        held = [path in arrays for path in link.targets]
        if any(held) and not all(held):
            raise UnsupportedError(
                f"save_adapter: {', '.join(link.targets)} are one in transformers' model, so that modules_to_save with "
                "some of them is not supported; choose all"
            )
        if all(held):
            made = link.transform.save([arrays[path] for path in link.targets])
            found |= {name: np.ascontiguousarray(array) for name, array in zip(link.sources, made, strict=True)}
    return found


def _config_of(
    adapter: Adapter,
    made: Mapping[str, PeftTensors],
    layers: Mapping[str, PeftLayer],
    tensors: Collection[str],
    saved: list[str],
) -> dict[str, Any]:
    config = adapter.config or LoraConfig()
    dora = {spec.dora for spec in adapter.specs.values()}
    if len(dora) > 1:
        raise UnsupportedError(
            "save_adapter: PEFT's files have DoRA for all layers or for none; a mixture is not supported"
        )
    rank, rank_pattern = usual({name: found.rank for name, found in made.items()})
    alphas = {name: _alpha(layers[name], found, config) for name, found in made.items()}
    alpha, alpha_pattern = usual(alphas)
    modules = {tensor.rpartition(".")[0] for tensor in tensors}
    extra = [each for each in modules if is_saved_name(f"{each}.x", saved) and each not in saved]
    if saved and extra:
        raise UnsupportedError(
            f"save_adapter: PEFT would take {extra[0]} for one of modules_to_save={saved}, too; such names are not "
            "supported"
        )
    plain = [name for name in made if layers[name].experts is None]
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(spec.dropout for spec in adapter.specs.values()),
        "use_rslora": config.use_rslora,
        "use_dora": dora == {True},
        "rank_pattern": _by_name(rank_pattern, made),
        "alpha_pattern": _by_name(alpha_pattern, made),
        "target_modules": _targets(plain, modules, saved),
        "target_parameters": sorted(name for name in made if layers[name].experts is not None) or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": bool(plain) and all(layers[name].is_conv1d for name in plain),
        "bias": "none",
        "init_lora_weights": True,
    }


def _alpha(layer: PeftLayer, found: PeftTensors, config: LoraConfig) -> float:
    """Return the alpha of a layer, as its config has it if that is what it computes with."""
    path = layer.paths[0]
    said = config.alpha_of(path)
    if found.rank == config.rank_of(path) and np.float32(config.scale_of(path)) == np.float32(found.scale):
        return _plain(said)
    return _plain(alpha_for(found.scale, found.rank, rslora=config.use_rslora))


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _by_name(patterns: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return what `usual` gave, by expressions of PEFT's: a `^` there is the beginning of the whole name."""
    return {pattern.removesuffix("$"): value for pattern, value in patterns.items()}


def _targets(names: Collection[str], modules: Collection[str], saved: Collection[str]) -> list[str]:
    """Return PEFT's `target_modules` for these modules: the last parts of their names if these mean no other one."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = {module for module in modules if ends_in(module, ends) and module not in saved}
    return ends if meant == set(names) else sorted(names)
