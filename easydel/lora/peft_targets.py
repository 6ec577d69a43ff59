"""Which modules of transformers' model an adapter's config means, as PEFT reads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from easydel.lora.peft_config import ALL_LINEAR, PeftConfig
from easydel.lora.peft_names import PeftLayer


def targeted(config: PeftConfig, layers: Mapping[str, PeftLayer], heads: Collection[str]) -> set[str]:
    """Return the names of the layers that a config means.

    Args:
        config: of the adapter.
        layers: name → layer of all that can be adapted.
        heads: names that `"all-linear"` leaves out.
    """
    plain = {name: layer for name, layer in layers.items() if layer.experts is None}
    found = {name for name in plain if _is_meant(config, name, layers[name].is_embedding, heads)}
    return found | {name for name in layers.keys() - plain.keys() if ends_in(name, config.target_parameters or ())}


def ends_in(name: str, ends: Iterable[str]) -> bool:
    """Whether a name is one of some names, or ends in one at a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def is_saved_name(tensor: str, names: Iterable[str]) -> bool:
    """Whether a tensor belongs to a module that PEFT trains whole for these `modules_to_save`."""
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(module.endswith(name) for module in modules for name in names)


def _is_meant(config: PeftConfig, name: str, is_embedding: bool, heads: Collection[str]) -> bool:
    left_out, targets = config.exclude_modules, config.target_modules
    if left_out and (re.fullmatch(left_out, name) if isinstance(left_out, str) else ends_in(name, left_out)):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(each)}($|\..*)", name) for each in config.modules_to_save or ()):
        return False
    if targets is None:
        return False
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return not is_embedding and name not in heads
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return ends_in(name, targets) and _is_of_layers(config, name)


def _is_of_layers(config: PeftConfig, name: str) -> bool:
    """Whether a module is of those layers that `layers_to_transform` numbers."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns: Sequence[str] = (
        [config.layers_pattern] if isinstance(config.layers_pattern, str) else (config.layers_pattern or [])
    )
    if patterns:
        matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        match = next((found for found in matches if found is not None), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return match is not None and int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
