"""Which layers of a module get adapters, and what these are like."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from easydel.errors import UnsupportedError
from easydel.layers.embedding import Embed
from easydel.layers.linear import Linear
from easydel.layers.moe.experts import ExpertLinear
from easydel.lora.config import LoraConfig
from easydel.lora.layer import AdapterSpec, plain_class
from easydel.lora.saved import is_inside, saved_modules
from easydel.lora.weights import is_experts
from easydel.paths import matching, named_modules, natural
from easydel.quantization.choose import Chosen, matching_layers, unshared_layers
from easydel.quantization.linear import QuantizedExpertLinear, QuantizedLinear

_LINEAR = (Linear, nnx.Linear, nnx.LinearGeneral, QuantizedLinear)
_EMBEDDINGS = (Embed, nnx.Embed)


@dataclass(frozen=True)
class Planned:
    """An adapter to be made.

    Attributes:
        chosen: the layer.
        spec: what its adapter is like.
        scales: what its product is multiplied by, in each layer of a stack.
    """

    chosen: Chosen
    spec: AdapterSpec
    scales: tuple[float, ...]


def is_adaptable(layer: Any, *, embeddings: bool = False) -> bool:
    """Whether a layer can get an adapter: a linear one, experts or, if asked for, an embedding.

    Classes with a forward pass of their own cannot: what is added to it might not be what folding adds to the weight.
    """
    kind: Any = plain_class(layer)
    if kind in (ExpertLinear, QuantizedExpertLinear):
        return True
    kinds: tuple[Any, ...] = _EMBEDDINGS if embeddings else _LINEAR
    return issubclass(kind, kinds) and any(kind.__call__ is each.__call__ for each in kinds)


def candidates(module: nnx.Module, *, embeddings: bool = False) -> list[Chosen]:
    """Return the layers that can get adapters, those that have one included."""
    return unshared_layers(
        module, lambda layer: is_adaptable(layer) or (embeddings and is_adaptable(layer, embeddings=True))
    )


def planned(module: nnx.Module, config: LoraConfig, heads: Collection[str] = ()) -> list[Planned]:
    """Return the layers that a config chooses, each with what its adapter is to be like; nothing is changed.

    Args:
        module: the whole, with or without adapters.
        config: of the adapters.
        heads: paths of modules that the default pattern leaves out, with all that they hold.

    Raises:
        ValueError: a pattern matches no layer; the nearest are named.
        UnsupportedError: an adapter that there is not, such as one with dropout for experts.
    """
    there = candidates(module, embeddings=config.embeddings)
    if config.modules_to_save:  # what is trained whole has no adapters
        whole = saved_modules(module, config.modules_to_save)
        there = [one for one in there if not is_inside(one.paths[0], whole)]
    if config.pattern is None:
        chosen = [one for one in there if not is_inside(one.paths[0], heads)]
        if not chosen:
            raise ValueError("the module has no linear layer besides its head; choose layers by a lora_pattern")
    else:
        chosen = _matched(module, there, config)
    paths = [path for one in chosen for path in one.paths]
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            try:
                matching(pattern, paths, what="adapted layer")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    plan = [_planned(one, config) for one in chosen]
    return _sharing(module, plan) if config.fused else plan


def _sharing(module: nnx.Module, plan: Sequence[Planned]) -> list[Planned]:
    """Return a plan in which layers that are one in Hugging Face's files share one `A`."""
    from easydel.lora.peft_names import sharing_layers

    by_path = {path: one for one in plan for path in one.chosen.paths}
    first: dict[str, str] = {}
    for group in sharing_layers(module):
        held = [by_path[path] for path in group if path in by_path]
        if not held:
            continue
        if len(held) < len(group):
            missed = next(path for path in group if path not in by_path)
            raise ValueError(
                f"fused=True: {', '.join(group)} are one layer in Hugging Face's files, but the lora_pattern leaves "
                f"out {missed}"
            )
        if len({one.spec.rank for one in held}) > 1:
            raise ValueError(f"fused=True: {', '.join(group)} share one A, but their ranks differ")
        first |= dict.fromkeys((one.chosen.path for one in held), min((one.chosen.path for one in held), key=natural))
    return [replace(one, spec=replace(one.spec, shares=first.get(one.chosen.path))) for one in plan]


def _matched(module: nnx.Module, there: Sequence[Chosen], config: LoraConfig) -> list[Chosen]:
    """Return the layers that the pattern chooses; say so if what it matches are no linear layers."""
    pattern = str(config.pattern)
    paths = {path for one in there for path in one.paths}
    modules = named_modules(module)
    others = {path: layer for path, layer in modules.items() if path not in paths and re.search(pattern, path)}
    if others and not any(re.search(pattern, path) for path in paths):
        path, layer = max(others.items(), key=lambda item: item[0].count("/"))
        why = f"the lora_pattern {pattern!r} matches no linear layer, but {path}, {_described(layer)}"
        if isinstance(layer, nnx.Embed):
            raise ValueError(f"{why}: embeddings get adapters with embeddings=True")
        raise ValueError(f"{why}: adapters are for linear layers and experts, such as {next(iter(sorted(paths)), '')}")
    return matching_layers(there, pattern, "adapting")


def _described(layer: Any) -> str:
    name = plain_class(layer).__name__
    kinds = (*_LINEAR, *_EMBEDDINGS, ExpertLinear)
    if isinstance(layer, kinds):
        return f"a {name} that shares its weight with another layer, or computes in a way of its own"
    return f"a {name}"


def _planned(one: Chosen, config: LoraConfig) -> Planned:
    layer, where = one.layer, one.paths[0]
    ranks = {config.rank_of(path): path for path in one.paths}
    if len(ranks) > 1:
        raise UnsupportedError(
            f"{' and '.join(ranks.values())} are stored stacked, so that adapters of the ranks "
            f"{', '.join(map(str, ranks))} are not supported: build the model with scan_layers=False"
        )
    if getattr(layer, "batch_axis", None):
        raise UnsupportedError(f"{where}: adapters of an nnx.LinearGeneral with batch_axis are not supported")
    embeds = isinstance(layer, nnx.Embed)
    dropout = 0.0 if embeds else float(config.dropout)  # of ids nothing is dropped, in PEFT neither
    if is_experts(layer) or embeds:
        what = "embeddings" if embeds else "experts"
        given = [name for name, value in (("dropout", dropout), ("use_dora", config.use_dora)) if value]
        if given:
            raise UnsupportedError(
                f"{where}: {', '.join(given)} is not supported for adapters of {what}; leave these out by the "
                "lora_pattern"
            )
    scales = tuple(config.scale_of(path) for path in one.paths)
    return Planned(one, AdapterSpec(config.rank_of(where), dropout, config.use_dora), scales)
