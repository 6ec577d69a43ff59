"""Which layers of a module are quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from easydel.errors import UnsupportedError
from easydel.layers.linear import product
from easydel.layers.moe.experts import ExpertLinear
from easydel.paths import matching, named_modules
from easydel.quantization.linear import is_quantizable
from easydel.stacked import layer_paths


@dataclass(frozen=True)
class Chosen:
    """A layer to quantize, or to adapt.

    Attributes:
        path: as it is stored, of a stack that of its range.
        layer: the layer.
        stack: of how many layers it holds the parameters; `None`: one layer.
    """

    path: str
    layer: Any
    stack: int | None

    @property
    def paths(self) -> list[str]:
        """The path of each layer."""
        return layer_paths(self.path) or [self.path]


def candidates(module: nnx.Module) -> list[Chosen]:
    """Return the layers that can be quantized: linear ones and experts whose kernel is nobody else's.

    Embeddings, norms and routers are of other classes, and a head that is tied shares its embedding's table.
    """
    return unshared_layers(module, is_quantizable)


def unshared_layers(module: nnx.Module, accepts: Callable[[Any], bool]) -> list[Chosen]:
    """Return the layers of a kind of which no variable is another layer's, too."""
    modules = named_modules(module, by_layer=False)
    uses = Counter(id(variable) for node in modules.values() for variable in _own(node))
    found = []
    for path, layer in modules.items():
        if accepts(layer) and all(uses[id(variable)] == 1 for variable in _own(layer)):
            layers = layer_paths(path)
            found.append(Chosen(path, layer, None if layers is None else len(layers)))
    return found


def _own(node: nnx.Module) -> list[nnx.Variable]:
    return [variable for variable in vars(node).values() if isinstance(variable, nnx.Variable)]


def matching_layers(there: Sequence[Chosen], pattern: str, doing: str) -> list[Chosen]:
    """Return those layers that a pattern (`re.search` on module paths) chooses.

    Args:
        there: what can be chosen.
        pattern: the regular expression.
        doing: what is to be done with them, for messages: "quantizing".

    Raises:
        ValueError: the pattern is no regular expression, or matches none of them; the nearest are named.
        UnsupportedError: some layers of a stack are chosen and others not.
    """
    picked = set(matching(pattern, [path for one in there for path in one.paths], what="linear layer"))
    chosen = [one for one in there if picked.intersection(one.paths)]
    for one in chosen:
        if missed := [path for path in one.paths if path not in picked]:
            raise UnsupportedError(
                f"{doing} some of the layers that are stored stacked is not supported: the pattern {pattern!r} "
                f"matches {next(path for path in one.paths if path in picked)}, but not {missed[0]}; build the model "
                "with scan_layers=False, or choose all of its layers"
            )
    return chosen


def chosen_layers(module: nnx.Module, pattern: str) -> list[Chosen]:
    """Return the layers that a pattern (`re.search` on module paths) chooses, all of which can be quantized.

    Raises:
        ValueError: the pattern is no regular expression, or matches no linear layer; the nearest are named.
        UnsupportedError: a layer computes in a way of its own, or some layers of a stack are chosen and others not.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"quantization_pattern={pattern!r}: expected a regular expression of module paths")
    chosen = matching_layers(candidates(module), pattern, "quantizing")
    for one in chosen:
        _check_layer(one)
    return chosen


_PLAIN: dict[str, tuple[Any, ...]] = {
    "dot_general": (product, jax.lax.dot_general, None),
    "dot_general_cls": (None,),
    "promote_dtype": (promote_dtype,),
    "preferred_element_type": (None,),
}


def _check_layer(one: Chosen) -> None:
    layer, where = one.layer, one.paths[0]
    if isinstance(layer, ExpertLinear):
        return
    for name, plain in _PLAIN.items():
        if getattr(layer, name, None) not in plain:
            raise UnsupportedError(
                f"{where}: quantizing a layer with a {name} of its own is not supported, since it would be ignored; "
                "leave it out by the quantization_pattern"
            )
    if getattr(layer, "batch_axis", None):
        raise UnsupportedError(
            f"{where}: quantizing an nnx.LinearGeneral with batch_axis is not supported; leave it out by the "
            "quantization_pattern"
        )
