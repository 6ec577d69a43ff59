"""Which module of transformers' model each of our layers is, as the family's weight table tells.

PEFT names what it adapts by the modules of transformers' model in memory. One of these may be several layers here
(GPT-2's `c_attn` is q, k and v): an adapter of it has one `A`, and a `B` over the outputs of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from easydel.hub.quantized import float_variables
from easydel.hub.transforms import Permute, Split
from easydel.hub.weight_map import Link, build_links
from easydel.lora.choose import is_adaptable
from easydel.lora.weights import is_experts
from easydel.paths import named_modules


@dataclass(frozen=True)
class PeftLayer:
    """What PEFT adapts as one.

    Attributes:
        name: of the module in transformers' model, of experts that of their parameter.
        paths: of our layers that make it up, in the order of its outputs.
        inputs: of each.
        outputs: of each of them.
        experts: how many there are; `None`: it is a plain layer.
        is_embedding: whether it is an embedding; its rows are the inputs.
        is_conv1d: whether its weight is `[in, out]` (PEFT's `fan_in_fan_out`).
        order: place of an experts' parameter among those of its module, as transformers' model declares them.
    """

    name: str
    paths: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]
    experts: int | None = None
    is_embedding: bool = False
    is_conv1d: bool = False
    order: int = 0


def memory_links(module: nnx.Module) -> list[Link]:
    """Return the weight map to transformers' model in memory; quantized kernels stand in it as floats."""
    return build_links(module, float_variables(module), form="memory")


def peft_layers(module: nnx.Module, links: list[Link] | None = None) -> dict[str, PeftLayer]:
    """Return name → layer of all that PEFT can adapt in transformers' model, and we here.

    Args:
        module: the model, also one of shapes.
        links: `memory_links(module)`, if the caller has it.
    """
    modules = named_modules(module)
    found = {}
    for link in memory_links(module) if links is None else links:
        layer = _layer_of(link, modules)
        if layer is not None:
            found[layer.name] = layer if layer.experts is None else replace(layer, order=_order(layer.name, modules))
    return found


def _order(name: str, modules: Mapping[str, Any]) -> int:
    """Return the place of a tensor in the weight maps; these list parameters as transformers' modules do."""
    rules = [rule for node in modules.values() for rule in getattr(node, "weight_map", ())]
    places = (n for n, rule in enumerate(rules) if any(name.endswith(f".{source}") for source in rule.sources))
    return next(places, len(rules))


def sharing_layers(module: nnx.Module) -> list[tuple[str, ...]]:
    """Return the paths of the layers that are one to PEFT, for each such group."""
    return [layer.paths for layer in peft_layers(module).values() if len(layer.paths) > 1]


def _layer_of(link: Link, modules: Mapping[str, Any]) -> PeftLayer | None:
    """Return what a line of the weight table is to PEFT; `None`: nothing that has adapters in both."""
    paths = tuple(target.rpartition("/")[0] for target in link.targets)
    layers = [modules[path] for path in paths]
    leaves = {target.rpartition("/")[2] for target in link.targets}
    embeds = isinstance(layers[0], nnx.Embed)
    if len(link.sources) != 1 or leaves != {"embedding" if embeds else "kernel"}:
        return None
    if not all(is_adaptable(layer, embeddings=embeds) for layer in layers):
        return None
    axes = _axes(link)
    module, _, leaf = link.sources[0].rpartition(".")
    shapes = link.target_shapes
    if axes is None or len({shape[:-1] for shape in shapes}) > 1:
        return None
    outputs, inputs = tuple(shape[-1] for shape in shapes), shapes[0][-2]
    if is_experts(layers[0]):
        plain = axes in ((0, 1, 2), (0, 2, 1)) and bool(module)
        return PeftLayer(link.sources[0], paths, inputs, outputs, shapes[0][0]) if plain else None
    if leaf != "weight" or not module or len(axes) != 2:
        return None
    if embeds:
        return PeftLayer(module, paths, inputs, outputs, is_embedding=True) if axes == (0, 1) else None
    return PeftLayer(module, paths, inputs, outputs, is_conv1d=axes == (0, 1))


def _axes(link: Link) -> tuple[int, ...] | None:
    """Return which axis of the source each axis of the targets is; `None`: it is no matter of axes.

    What is split must be split along the outputs.
    """
    transform = link.transform
    inner = transform.inner if isinstance(transform, Split) else transform
    if not isinstance(inner, Permute):
        return None
    axes = tuple(range(len(link.target_shapes[0]))) if inner.axes is None else inner.axes
    if len(axes) < 2 or (isinstance(transform, Split) and transform.axis != axes[-1]):
        return None
    return axes
