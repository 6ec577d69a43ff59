"""Which modules of the two models are the same: those that the same tensors of a checkpoint go into.

The weight map says which tensors make which variables, so no family needs a table of its own here. A module that holds
part of a tensor, as each of q, k and v does of a fused one, has no counterpart; what holds all of it has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from easydel.hub.weight_map import Link, links_by_form, stored_variables
from easydel.paths import named_modules

Holdings = Mapping[str, Collection[frozenset[str]]]


def is_layer(path: str) -> bool:
    """Whether a path ends with the first number in it: a layer of a stack."""
    *before, last = path.replace(".", "/").split("/")
    return last.isdigit() and not any(part.isdigit() for part in before)


def held_tensors(model: Any) -> dict[str, set[frozenset[str]]]:
    """Return path → names of the tensors that are all in this module, in each form of checkpoint there is."""
    modules = named_modules(model)
    forms = links_by_form(model, stored_variables(model), modules)
    found: dict[str, set[frozenset[str]]] = {path: set() for path in modules if path}
    for links in forms.values():
        for path in found:
            found[path].add(_held(path, links))
    return {path: sets - {frozenset()} for path, sets in found.items()}


def _held(path: str, links: Sequence[Link]) -> frozenset[str]:
    names: set[str] = set()
    for link in links:
        inside = [target.startswith(f"{path}/") for target in link.targets]
        if all(inside):
            names.update(link.sources)
        elif any(inside):
            return frozenset()
    return frozenset(names)


def match_modules(ours: Holdings, theirs: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Return path here → name in transformers of the modules that are the same.

    Where one module wraps another and adds no tensors, the innermost ones are matched.

    Args:
        ours: of each module that was called, by path: the tensors it holds, in each form of checkpoint.
        theirs: likewise by name; there is one form.
    """
    of_theirs: dict[frozenset[str], str] = {}
    for name, tensors in theirs.items():
        if tensors and name.count(".") >= of_theirs.get(tensors, "").count("."):
            of_theirs[tensors] = name
    found: dict[str, str] = {}
    for path in sorted(ours, key=lambda path: -path.count("/")):
        same = next((of_theirs[tensors] for tensors in ours[path] if tensors in of_theirs), None)
        if same is not None and same not in found.values():
            found[path] = same
    for path in filter(is_layer, ours):
        layer = found.get(path) or _layer(ours[path], theirs)
        found |= {} if layer is None else {path: layer}
    return _as_in_other_layers(found, ours, theirs) | found


def _as_in_other_layers(found: Mapping[str, str], ours: Holdings, theirs: Mapping[str, Any]) -> dict[str, str]:
    """Return what the modules of each layer are called if it is like another layer of its stack.

    One layer may hold a tensor that serves all of them, so that what is around it seems to be another module.
    """
    layers = {path: name for path, name in found.items() if is_layer(path)}
    alike: dict[str, str] = {}
    for path, name in found.items():
        for layer, called in layers.items():
            if not path.startswith(f"{layer}/") or not name.startswith(f"{called}."):
                continue
            inside, rest = path.removeprefix(layer), name.removeprefix(called)
            siblings = {x: y for x, y in layers.items() if x.rpartition("/")[0] == layer.rpartition("/")[0]}
            alike |= {x + inside: y + rest for x, y in siblings.items() if x + inside in ours and y + rest in theirs}
    return {path: name for path, name in alike.items() if path not in found and name not in found.values()}


def _layer(held: Collection[frozenset[str]], theirs: Mapping[str, frozenset[str]]) -> str | None:
    """Return the smallest layer in transformers that holds these tensors, and perhaps one that all layers share."""
    return next((name for name in filter(is_layer, theirs) for tensors in held if tensors <= theirs[name]), None)
