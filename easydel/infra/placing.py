"""How the base class puts a module's variables on devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.paths import flatten, named_variables, nest, to_state
from easydel.sharding import (
    PartitionRules,
    gather,
    infer_rules,
    match_rules,
    named_shardings,
    place,
    spread_spec,
)


def rules_in_force(module: Any) -> PartitionRules:
    """Return the config's rules, or those inferred from the layers."""
    get_rules = getattr(module.config, "get_partition_rules", None)
    rules = get_rules() if get_rules is not None else None
    return infer_rules(module) if rules is None else rules


def module_shardings(module: Any, rules: PartitionRules, mesh: Mesh, *, strict: bool = False) -> dict[str, Any]:
    """Return path → sharding of every variable: parameters by the rules, other state replicated."""
    params = {path: v.get_value() for path, v in named_variables(module, nnx.Param).items()}
    shardings: dict[str, Any] = dict(named_shardings(match_rules(rules, params), params, mesh, strict=strict))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {path: shardings.get(path, everywhere) for path in named_variables(module)}


def spread_shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Return path → sharding that splits each parameter over all devices; warns of those that cannot be split."""
    shardings, whole = {}, []
    for path, variable in named_variables(module).items():
        spec = spread_spec(variable.get_value().shape, mesh) if isinstance(variable, nnx.Param) else PartitionSpec()
        if spec is None:
            whole.append(path)
        shardings[path] = NamedSharding(mesh, spec or PartitionSpec())
    if whole and mesh.size > 1:
        shown = ", ".join(whole[:8]) + (f" and {len(whole) - 8} more" if len(whole) > 8 else "")
        warnings.warn(
            f"{len(whole)} parameter(s) have no dimension divisible by {mesh.size} devices and are replicated: {shown}",
            stacklevel=3,
        )
    return shardings


def apply_to_variables(module: nnx.Module, functions: Mapping[str, Callable[[Any], Any]]) -> None:
    """Replace each variable's array by what its function makes of it, one after the other (little extra memory)."""
    for path, variable in named_variables(module).items():
        variable.set_value(functions[path](variable.get_value()))


def placers(shardings: Mapping[str, Any]) -> dict[str, Callable[[Any], jax.Array]]:
    """Return path → function that puts an array where its sharding says."""

    def placer(sharding: Any) -> Callable[[Any], jax.Array]:
        return lambda array: place(array, sharding)

    return {path: placer(sharding) for path, sharding in shardings.items()}


def apply_to_tree(tree: Any, rules: PartitionRules, mesh: Mesh, *, is_gather: bool) -> Any:
    """Return a new tree of the same kind (nested dict or `nnx.State`) with every leaf sharded, or gathered."""
    flat = flatten(tree)
    if is_gather:
        moved = {path: gather(leaf) for path, leaf in flat.items()}
    else:
        moved = {
            path: place(flat[path], s) for path, s in named_shardings(match_rules(rules, flat), flat, mesh).items()
        }
    return to_state(nest(moved)) if isinstance(tree, nnx.State) else nest(moved)
