"""Names of what a module holds: `/`-joined paths, the one spelling every other room uses.

A path joins attribute names and list positions with `/`, for example
`model/layers/0/self_attn/q_proj/kernel`. Sharding rules, quantization and LoRA patterns, weight
tables and the nested dictionaries of `model.params` all speak of variables by these paths, so this
is the only file that knows how flax.nnx lays a module out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from easydel.stacked import Held, Layers, LayerVariable, layer_of, layer_paths, range_of

N = TypeVar("N")


def _join(parts: tuple[Any, ...]) -> str:
    for part in parts:
        if isinstance(part, str) and (part.isdigit() or "/" in part):
            raise ValueError(
                f"the attribute or nnx.Dict key {part!r} (in {'/'.join(map(str, parts))}) would make paths ambiguous: "
                "names must not be all digits (those are list positions) and must not contain '/'"
            )
    return "/".join(map(str, parts))


def _walk(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, node) of every variable and module-like node once, children before parents, in nnx's own order.

    It gives what `nnx.iter_graph` gives, without visiting the many static attributes: that is 20 times as fast, and
    nearly every view of a model starts here.
    """
    seen: set[int] = set()

    def visit(parts: tuple[Any, ...], node: Any) -> Iterator[tuple[str, Any]]:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, nnx.Variable):
            yield _join(parts), node
            return
        for key, child in _children(node):
            yield from visit((*parts, key), child)
        if isinstance(node, nnx.Pytree):
            yield _join(parts), node

    return visit((), module)


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        items: Iterable[tuple[Any, Any]] = enumerate(node)
    elif isinstance(node, nnx.Pytree):
        names = vars(node)
        items = [(name, names[name]) for name in sorted(names) if not name.startswith("_pytree__")]
    else:
        items = sorted(node.items(), key=lambda item: item[0])
    return [(key, child) for key, child in items if _may_hold(child)]


def _may_hold(value: Any) -> bool:
    if type(value) in _PLAIN:  # nnx's own check of a variable is slow, and a walk would make thousands
        return False
    return isinstance(value, nnx.Variable | nnx.Pytree | list | tuple | dict)


_PLAIN = frozenset({type(None), bool, int, float, str, type, FunctionType, type(np.dtype("float32"))})


def natural(path: str) -> list[tuple[bool, int, str]]:
    """Return what paths are sorted by: names by letters, layers by number."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split("/")]


def named_variables(
    module: nnx.Module, kind: type[nnx.Variable] = nnx.Variable, *, by_layer: bool = True
) -> dict[str, Any]:
    """Return every variable of `kind` (shared ones once) by path, layers in numeric order.

    Args:
        module: where to look.
        kind: of variables.
        by_layer: of layers stored stacked, return each layer's part (`easydel.stacked.LayerVariable`); else the
            stacked variables as they are, under their ranges (`layers/0:8:2/…`).
    """
    found: dict[str, Held] = {}
    for path, node in _walk(module):
        if isinstance(node, kind):
            paths = layer_paths(path) if by_layer else None
            found |= {path: node} if paths is None else {p: LayerVariable(node, n) for n, p in enumerate(paths)}
    return {path: found[path] for path in sorted(found, key=natural)}


def named_modules(module: nnx.Module, *, by_layer: bool = True) -> dict[str, nnx.Module]:
    """Return every submodule (shared ones once) by path; the root's path is the empty string.

    Args:
        module: where to look.
        by_layer: of layers stored stacked, return the one module that holds them under each layer's path; else
            once, under their range.
    """
    found: dict[str, nnx.Module] = {}
    for path, node in _walk(module):
        if isinstance(node, nnx.Module):
            found |= dict.fromkeys((layer_paths(path) if by_layer else None) or [path], node)
    return {path: found[path] for path in sorted(found, key=natural)}


def plain_arrays(module: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Return path → (module, attribute) of the arrays that modules keep outside variables, as they are stored."""
    return {
        f"{path}/{name}" if path else name: (node, name)
        for path, node in named_modules(module, by_layer=False).items()
        for name, value in vars(node).items()
        if isinstance(value, jax.Array | jax.ShapeDtypeStruct)
    }


def nodes_of(module: nnx.Module, kind: type[N]) -> list[N]:
    """Return every node of a class once: modules and what else nnx sees into, such as streams of random keys."""
    return [node for _, node in _walk(module) if isinstance(node, kind)]


def drop_attribute(node: Any, name: str) -> None:
    """Delete an attribute of a module, so that it is again what it was before it had it."""
    delattr(node, name)
    kinds = node._pytree__nodes  # else the name stays part of the structure
    object.__setattr__(node, "_pytree__nodes", type(kinds)({key: kind for key, kind in kinds.items() if key != name}))


def split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """Return `(graphdef, parameters, other state)`; `nnx.merge` of the three is the module again.

    The states hold variables of their own (the arrays are shared): what happens to the module does not show in them.
    """
    graphdef, params, *other = nnx.split(module, nnx.Param, ...)
    return graphdef, detached(params), detached(other[0])


def detached(state: nnx.State) -> nnx.State:
    """Return a state with the same arrays in new variables."""
    return jax.tree.map(lambda array: array, state)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `{"a/b": x}` into `{"a": {"b": x}}`; what stands under ranges of layers becomes `Layers`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return _with_layers(tree) if any(layer_paths(path) for path in flat) else tree


def _with_layers(tree: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _with_layers(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return Layers(nested) if any(map(range_of, nested)) else nested


def flatten(tree: Mapping[Any, Any], *, by_layer: bool = True) -> dict[str, Any]:
    """Turn a nested mapping (a `dict` or `nnx.State`, string or integer keys) into `{path: leaf}`.

    Variables are replaced by the arrays they hold.

    Args:
        tree: the mapping.
        by_layer: return each layer's part of what is stored stacked (arrays are copied), else the stacks.
    """
    flat = _flatten(tree, "")
    return each_layer(flat) if by_layer else flat


def _flatten(tree: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in (tree.stacks if isinstance(tree, Layers) else tree).items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping | nnx.State):
            flat |= _flatten(value, path)
        else:
            flat[path] = value.get_value() if isinstance(value, nnx.Variable) else value
    return flat


def each_layer(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Replace what belongs to a stack of layers by each layer's part."""
    parts: dict[str, Any] = {}
    for path, value in flat.items():
        paths = layer_paths(path)
        parts |= {path: value} if paths is None else {p: layer_of(value, n) for n, p in enumerate(paths)}
    return parts


def to_state(tree: Mapping[Any, Any]) -> nnx.State:
    """Turn a nested mapping into the `nnx.State` that `nnx.merge` takes.

    `nnx.merge` pairs leaves with their places *by sorted order*, and `"10"` sorts before `"2"`: list
    positions must be integers again, or layers would silently change places.
    """
    items = (
        (tuple(int(p) if p.isdigit() else p for p in path.split("/")), x)
        for path, x in flatten(tree, by_layer=False).items()
    )
    return nnx.from_flat_state(sorted(items, key=lambda item: [(isinstance(p, str), p) for p in item[0]]))


def matching(pattern: str, paths: Iterable[str], *, what: str = "path") -> list[str]:
    """Return the paths in which `pattern` is found (`re.search`).

    Raises:
        ValueError: the pattern is no regular expression, or matches nothing; the nearest paths are named.
    """
    paths = list(paths)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    if found := [path for path in paths if compiled.search(path)]:
        return found
    near = nearest(pattern, paths)
    if not near:  # a short name is like no long path, but perhaps like the end of one
        ends = nearest(pattern, dict.fromkeys(path.rpartition("/")[2] for path in paths))
        near = [next(path for path in paths if path.rpartition("/")[2] == end) for end in ends]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(f"the pattern {pattern!r} matches no {what}{hint}")


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` candidates that look most like `name` (for error messages)."""
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", name)
    return difflib.get_close_matches(plain, list(candidates), n=count, cutoff=0.3)
