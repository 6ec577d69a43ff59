"""Fit a PEFT adapter's config and tensors to each other and to a model, before a byte of any tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx

from easydel.errors import CheckpointError
from easydel.hub.report import Problem, describe, raise_problems
from easydel.hub.safetensors import TensorEntry
from easydel.hub.weight_map import Link, tied_names
from easydel.lora.peft_files import CONFIG, AdapterFiles
from easydel.lora.peft_names import PeftLayer, memory_links, peft_layers
from easydel.lora.peft_targets import is_saved_name, targeted
from easydel.lora.peft_tensors import tensor_shapes
from easydel.lora.saved import is_inside
from easydel.paths import nearest

PREFIX = "base_model.model."
CURE = "Check that this adapter was trained on this model, and that its files belong together."


@dataclass(frozen=True)
class Names:
    """What a model is called in transformers.

    Attributes:
        layers: name → layer of all that can be adapted.
        links: name of each tensor → the line of the weight table that it stands in.
        heads: names of the layers that are the model's head.
        prefix: of the backbone in models with a head.
        ties: name of a tied tensor → the one it is tied to.
    """

    layers: Mapping[str, PeftLayer]
    links: Mapping[str, Link]
    heads: frozenset[str] = frozenset()
    prefix: str = ""
    ties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any, heads: Collection[str], untied: nnx.Module | None, new: Collection[str]) -> Names:
        """Return the names of a model.

        Args:
            module: the model.
            heads: paths of its head.
            untied: of a tied model, the one of shapes that it is when untied.
            new: paths of the modules that only that one has.
        """
        links = memory_links(module)
        layers = peft_layers(module, links)
        if untied is not None:
            extra = [each for each in memory_links(untied) if any(is_inside(path, new) for path in each.targets)]
            links, layers = [*links, *extra], layers | peft_layers(untied, extra)
        every = {*heads, *new}
        return cls(
            layers,
            {name: link for link in links for name in link.sources},
            frozenset(layer.name for layer in layers.values() if any(is_inside(path, every) for path in layer.paths)),
            getattr(module, "base_model_prefix", "") or "",
            tied_names(module),
        )


@dataclass(frozen=True)
class AdapterMatch:
    """What to read.

    Attributes:
        adapted: layer, and end of the name → tensor, of each adapter.
        saved: the lines of the weight table that `modules_to_save` are.
        base: tensors of the base that the file holds, too, with their lines.
        table: name, as this model has it → tensor, of what is no adapter's.
        spelled: name of a layer → as the file has it.
    """

    adapted: list[tuple[PeftLayer, dict[str, TensorEntry]]]
    saved: list[Link]
    base: dict[str, tuple[TensorEntry, Link]]
    table: Mapping[str, TensorEntry]
    spelled: Mapping[str, str]


def match_adapter(files: AdapterFiles, names: Names) -> AdapterMatch:
    """Pair what an adapter's config means with its tensors, and with the layers of a model.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or no floats; all are listed.
    """
    config, where = files.config, files.directory
    spelled = _spelled(names, files.table)
    by_file = {spelled.get(name, name): layer for name, layer in names.layers.items()}
    heads = {spelled.get(name, name) for name in names.heads}
    meant = targeted(config, by_file, heads)
    if not meant:
        near = nearest(str(config.target_modules or config.target_parameters), by_file, 1)
        raise CheckpointError(
            f"{where / CONFIG}: target_modules={config.target_modules!r}, target_parameters="
            f"{config.target_parameters!r} mean no layer of this model that can be adapted"
            + (f" (nearest: {near[0]})" if near else "")
        )
    problems: list[Problem] = []
    prefixes = nested_names({name: by_file[name] for name in meant})
    expected: dict[str, tuple[str, str]] = {}
    for name in sorted(meant):
        for end, shape in tensor_shapes(by_file[name], config.rank_of(name), dora=config.use_dora).items():
            key = f"{PREFIX}{prefixes[name]}.{end}"
            expected[key] = name, end
            problems += _faults(key, shape, files.table)
    adapted: dict[str, dict[str, TensorEntry]] = {name: {} for name in meant}
    rest: dict[str, TensorEntry] = {}
    for key, entry in files.table.items():
        plain = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
        if plain in expected:
            name, end = expected[plain]
            adapted[name][end] = entry
        elif ".lora_" in key or not key.startswith(PREFIX):
            found = describe(entry.dtype, entry.shape)
            problems.append(Problem("unexpected", key, _why(key, by_file, meant), found))
        else:
            rest[key] = entry
    saved, base, table = _other_tensors(files, names, rest, spelled, problems)
    raise_problems(problems, where, CURE)
    return AdapterMatch(
        [(by_file[name], adapted[name]) for name in sorted(meant)],
        saved,
        base,
        table,
        spelled | {layer.name: name for name, layer in by_file.items()},
    )


def _spelled(names: Names, table: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Return our name of a tensor or layer → the file's, where that lacks, or has, the prefix of the backbone."""
    dot = f"{names.prefix}."
    every = [*names.links, *names.layers]
    if dot == ".":
        return {}
    ours = any(name.startswith(dot) for name in every)
    theirs = any(key.startswith(PREFIX + dot) for key in table)
    if theirs and not ours:
        return {name: dot + name for name in every}
    if ours and not theirs:
        without = {name: name.removeprefix(dot) for name in every}
        backbone = any(
            key.startswith(f"{PREFIX}{short}.") for name, short in without.items() if name != short for key in table
        )
        return without if backbone else {}
    return {}


def nested_names(layers: Mapping[str, PeftLayer]) -> dict[str, str]:
    """Return name → what the names of its tensors begin with: PEFT nests the adapters of one module's parameters."""
    inside: dict[str, list[str]] = {}
    for name, layer in layers.items():
        module = name if layer.experts is None else name.rpartition(".")[0]
        inside.setdefault(module, []).append(name)
    found = {}
    for module, members in inside.items():
        for depth, name in enumerate(sorted(members, key=lambda each: layers[each].order, reverse=True)):
            found[name] = module + depth * ".base_layer"
    return found


def _faults(key: str, shape: tuple[int, ...], table: Mapping[str, TensorEntry]) -> list[Problem]:
    entry = table.get(key) or table.get(f"{key}.weight")
    if entry is None:
        return [Problem("missing", key, describe("float", shape), "nothing")]
    if not jnp.issubdtype(entry.dtype, jnp.floating):
        return [Problem("dtype", key, describe("float", shape), describe(entry.dtype, entry.shape))]
    if entry.shape != shape:
        return [Problem("shape", key, describe("float", shape), describe(entry.dtype, entry.shape))]
    return []


def _why(key: str, layers: Mapping[str, PeftLayer], meant: Collection[str]) -> str:
    """Say what is expected in place of a tensor that nothing explains."""
    if not key.startswith(PREFIX):
        return f"a name that begins with {PREFIX}"
    module = key.removeprefix(PREFIX).partition(".lora_")[0].removesuffix(".base_layer")
    if module in meant:
        return "nothing (the config asks for no such tensor)"
    return "nothing (the config does not mean this layer)" if module in layers else "nothing (no such layer here)"


def _other_tensors(
    files: AdapterFiles,
    names: Names,
    rest: Mapping[str, TensorEntry],
    spelled: Mapping[str, str],
    problems: list[Problem],
) -> tuple[list[Link], dict[str, tuple[TensorEntry, Link]], dict[str, TensorEntry]]:
    """Return `saved`, `base` and `table` of `AdapterMatch`; add to the problems."""
    ours = {spelled.get(name, name): name for name in names.links}
    wanted = files.config.modules_to_save or []
    table: dict[str, TensorEntry] = {}
    base: dict[str, tuple[TensorEntry, Link]] = {}
    for key, entry in rest.items():
        theirs = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        is_saved = is_saved_name(theirs, wanted)
        name = ours.get(theirs, "") if is_saved else names.ties.get(theirs, ours.get(theirs, ""))
        if name not in names.links:
            problems.append(Problem("unexpected", key, "nothing", describe(entry.dtype, entry.shape)))
            continue
        link = names.links[name]
        shape = link.source_shapes[link.sources.index(name)]
        if entry.shape != shape or not jnp.issubdtype(entry.dtype, jnp.floating):
            problems.append(Problem("shape", key, describe("float", shape), describe(entry.dtype, entry.shape)))
        table[name] = entry
        if not is_saved:
            base[name] = entry, link
    means = {name for name in ours if is_saved_name(name, wanted)}
    saved = {id(names.links[ours[name]]): names.links[ours[name]] for name in means}
    if wanted and not means:
        problems.append(Problem("missing", f"modules_to_save={wanted}", "modules of this model", "none"))
    for link in saved.values():
        for name, shape in zip(link.sources, link.source_shapes, strict=True):
            if name not in table:
                problems.append(
                    Problem("missing", PREFIX + spelled.get(name, name), describe("float", shape), "nothing")
                )
    return list(saved.values()), base, table
