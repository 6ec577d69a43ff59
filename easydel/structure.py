"""Splitting the same module again and again: what was found out the first time is kept while it holds.

`nnx.split` of a deep module takes tens of milliseconds, most of them spent on what never changes.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from easydel.paths import named_variables, split


@dataclass(frozen=True, eq=False)
class Structure:
    """A module without its arrays: a key for compiled functions.

    Attributes:
        graphdef: of the module; it holds no arrays.
        content: the config, frozen: the graphdef holds the config itself, which may be changed later.
    """

    graphdef: Any
    content: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graphdef, self.content))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Structure) or self._hash != other._hash:
            return False
        return (self.graphdef, self.content) == (other.graphdef, other.content)


@dataclass(frozen=True)
class _Known:
    """One module's structure, and where the leaves of its states stand among its variables."""

    outline: Any
    structure: Structure
    states: tuple[tuple[Any, tuple[int, ...]], ...]

    def fill(self, variables: list[nnx.Variable]) -> list[nnx.State]:
        """Return the states with the variables' present arrays."""
        return [jax.tree.unflatten(tree, [variables[i].get_value() for i in places]) for tree, places in self.states]


_KNOWN: weakref.WeakKeyDictionary[nnx.Module, _Known] = weakref.WeakKeyDictionary()


def split_again(module: nnx.Module) -> tuple[Structure, nnx.State, nnx.State]:
    """Return `(structure, parameters, other state)`, as `easydel.paths.split` does.

    Variables that were replaced, tied or changed in kind since the last time are noticed.
    """
    leaves, tree = jax.tree.flatten(module, is_leaf=_is_variable)
    outline = _outline(leaves, tree)
    known = _KNOWN.get(module)
    if known is None or outline is None or known.outline != outline:
        structure, states = _split(module)
        known = None if outline is None else _remember(module, outline, structure, states, leaves)
        if known is None:
            return structure, *states
    params, other = known.fill(leaves)
    return known.structure, params, other


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _outline(leaves: list[Any], tree: Any) -> Any:
    """Return all that a structure depends on; `None` if the module holds more than variables of one array each."""
    if not all(_is_variable(leaf) and isinstance(leaf.get_value(), jax.Array) for leaf in leaves):
        return None
    first: dict[int, int] = {}
    sharing = tuple(first.setdefault(id(leaf), place) for place, leaf in enumerate(leaves))
    return tree, sharing, [(type(leaf), dict(leaf.get_metadata())) for leaf in leaves]


def _split(module: Any) -> tuple[Structure, tuple[nnx.State, nnx.State]]:
    graphdef, params, other = split(module)
    config: Any = getattr(module, "config", None)
    content = config.content() if hasattr(config, "content") else repr(config)
    return Structure(graphdef, content), (params, other)


def _remember(module: Any, outline: Any, structure: Structure, states: Any, leaves: list[Any]) -> _Known | None:
    place = {id(leaf): index for index, leaf in reversed(list(enumerate(leaves)))}
    variables = named_variables(module, by_layer=False)
    found = []
    for state in states:
        paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
        if not all(path in variables and id(variables[path]) in place for path in paths):
            return None
        found.append((jax.tree.structure(state), tuple(place[id(variables[path])] for path in paths)))
    known = _Known(outline, structure, tuple(found))
    _KNOWN[module] = known
    return known
