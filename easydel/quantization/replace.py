"""Putting other layers into a module, wherever it holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from easydel.paths import nodes_of


def replace_modules(module: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Replace submodules in place, under every name they have.

    Args:
        module: the whole.
        new: id of a submodule → what comes in its place.
    """
    for node in nodes_of(module, nnx.Pytree):
        if id(node) in new:
            continue
        if isinstance(node, nnx.List):
            for index, child in enumerate(node):
                if id(child) in new:
                    node[index] = new[id(child)]
            continue
        for name, child in list(vars(node).items()):
            if name.startswith("_pytree__"):
                continue
            if id(child) in new:
                setattr(node, name, new[id(child)])
            elif isinstance(child, list | tuple | dict):
                replaced = _replaced(child, new)
                if replaced is not child:
                    setattr(node, name, nnx.data(replaced))


def _replaced(value: Any, new: Mapping[int, nnx.Module]) -> Any:
    """Return plain containers with their modules replaced; the very same if there is nothing to replace."""
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, dict):
        made: Any = {key: _replaced(item, new) for key, item in value.items()}
        return value if all(made[key] is item for key, item in value.items()) else made
    if isinstance(value, list | tuple):
        items = [_replaced(item, new) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    return value
