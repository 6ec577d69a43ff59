"""How the base class puts a module's variables on devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.distributed import warn
from easydel.lora import adapted_layers, adapter_spec, lora_paths
from easydel.lora.weights import weight_name, weight_shape
from easydel.paths import flatten, named_variables, nest, plain_arrays, to_state
from easydel.quantization import QuantizedWeight, quantized_layers
from easydel.sharding import (
    AXIS_NAMES,
    AnyMesh,
    PartitionRules,
    ShardingExplanation,
    as_mesh,
    check_mesh,
    explain_rules,
    find_matches,
    fit_spec,
    gather,
    infer_rules,
    named_shardings,
    place,
    spread_spec,
)
from easydel.sharding.rules import RuleMatch
from easydel.stacked import layer_of, layer_paths


def rules_in_force(module: Any) -> PartitionRules:
    """Return the config's rules, or those inferred from the layers."""
    get_rules = getattr(module.config, "get_partition_rules", None)
    rules = get_rules() if get_rules is not None else None
    return infer_rules(module) if rules is None else rules


def mesh_of(module_or_config: Any, mesh: Any) -> AnyMesh:
    """Return a mesh given as such, as axis sizes, or not at all: the model's or config's then."""
    if mesh is None:
        return module_or_config.mesh
    config = getattr(module_or_config, "config", module_or_config)
    return as_mesh(mesh, getattr(config, "sharding_axis_names", AXIS_NAMES))


def module_shardings(module: Any, rules: PartitionRules, mesh: AnyMesh, *, strict: bool = False) -> dict[str, Any]:
    """Return path → sharding of every array as it is stored: parameters by the rules, other state replicated."""
    variables = named_variables(module, by_layer=False)
    derived = derived_matches(module, rules, mesh)
    params = {p: v.get_value() for p, v in variables.items() if isinstance(v, nnx.Param) and p not in derived}
    arrays = params | {path: variables[path].get_value() for path in derived}
    matches = find_matches(rules, params) | {path: match for path, (_, match) in derived.items()}
    specs = {path: match.spec for path, match in matches.items()}
    shardings: dict[str, Any] = dict(named_shardings(specs, arrays, mesh, strict=strict, rules=matches))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {path: shardings.get(path, everywhere) for path in (*variables, *plain_arrays(module))}


def explain(module: Any, rules: PartitionRules | None, mesh: Any) -> ShardingExplanation:
    """Work out what rules make of a module on a mesh; see `EasyDeLBaseModule.explain_sharding`."""
    arrays = {path: variable.get_value() for path, variable in named_variables(module, by_layer=False).items()}
    lora = lora_paths(module)
    params = {p: arrays.pop(p) for p in named_variables(module, nnx.Param, by_layer=False) if p not in lora}
    arrays |= {path: getattr(node, name) for path, (node, name) in plain_arrays(module).items()}
    rules = rules_in_force(module) if rules is None else rules
    mesh = mesh_of(module, mesh)
    matches = derived_matches(module, rules, mesh)
    derived = {path: (arrays.pop(path), kernel, match) for path, (kernel, match) in matches.items()}
    return explain_rules(rules, params, mesh, arrays, derived)


def derived_matches(module: Any, rules: PartitionRules, mesh: AnyMesh) -> dict[str, tuple[str, RuleMatch]]:
    """Return path of what has no rule of its own → path of the weight it follows, and what that one's rule makes of it.

    Raises:
        ShardingError: the rules do not fit the weights, or the mesh.
    """
    return quantized_matches(module, rules, mesh) | lora_matches(module, rules)


def lora_matches(module: Any, rules: PartitionRules) -> dict[str, tuple[str, RuleMatch]]:
    """Return path of an adapter's parameter → path of its layer's weight, and what that one's rule makes of it.

    Raises:
        ShardingError: the rules do not fit the weights.
    """
    layers = {f"{path}/{weight_name(layer)}": layer for path, layer in adapted_layers(module).items()}
    weights = {path: _kernel_shape(path, layer) for path, layer in layers.items()}
    found, own = {}, lora_paths(module)
    for path, match in find_matches(rules, weights).items():
        layer, prefix = layers[path], path.rpartition("/")[0]
        for name in layer.lora.variables():
            if f"{prefix}/lora/{name}" in own:  # one that layers share follows the first of them
                spec = adapter_spec(layer, name, layer_of(match.spec, 0) if match.is_stack else match.spec)
                spec = PartitionSpec(None, *spec) if match.is_stack else spec
                found[f"{prefix}/lora/{name}"] = path, replace(match, spec=spec)
    return found


def param_specs(module: Any, rules: PartitionRules) -> dict[str, PartitionSpec]:
    """Return path → spec of every parameter."""
    return {path: match.spec for path, match in _param_matches(module, rules).items()}


def param_shardings(module: Any, rules: PartitionRules, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Return path → sharding of every parameter."""
    matches = _param_matches(module, rules)
    arrays = {path: v.get_value() for path, v in named_variables(module, nnx.Param, by_layer=False).items()}
    return named_shardings({path: match.spec for path, match in matches.items()}, arrays, mesh, rules=matches)


def _param_matches(module: Any, rules: PartitionRules) -> dict[str, RuleMatch]:
    params = {path: v.get_value() for path, v in named_variables(module, nnx.Param, by_layer=False).items()}
    lora = {path: match for path, (_, match) in lora_matches(module, rules).items()}
    found = find_matches(rules, {path: array for path, array in params.items() if path not in lora})
    return {path: lora[path] if path in lora else found[path] for path in params}


def quantized_matches(module: Any, rules: PartitionRules, mesh: AnyMesh) -> dict[str, tuple[str, RuleMatch]]:
    """Return path of codes or scales → path of the float kernel they stand for, and what its rule makes of them.

    That is the transposed spec, for scales without the axes that do not divide the groups.

    Raises:
        ShardingError: the rules do not fit the kernels, or the mesh.
    """
    layers = {f"{path}/kernel" if path else "kernel": layer for path, layer in quantized_layers(module).items()}
    kernels = {path: _kernel_shape(path, layer) for path, layer in layers.items()}
    found = {}
    for path, match in find_matches(rules, kernels).items():
        for name, variable in layers[path].weight_variables().items():
            spec = layers[path].spec_of(name, layer_of(match.spec, 0) if match.is_stack else match.spec)
            spec = PartitionSpec(None, *spec) if match.is_stack else spec
            if name == "scales":
                spec = fit_spec(spec, variable.get_value().shape, mesh, path=path, rule=match)
            found[f"{path.removesuffix('kernel')}{name}"] = path, replace(match, spec=spec)
    return found


def _kernel_shape(path: str, layer: Any) -> jax.ShapeDtypeStruct:
    stack = layer_paths(path)
    shape = weight_shape(layer, None if stack is None else len(stack))
    return jax.ShapeDtypeStruct((*([len(stack)] if stack else []), *shape), layer.param_dtype)


def spread_shardings(module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
    """Return path → sharding that splits each parameter over all devices; warns of those that cannot be split."""
    check_mesh(mesh)
    shardings, whole = dict.fromkeys(plain_arrays(module), NamedSharding(mesh, PartitionSpec())), []
    for path, variable in named_variables(module, by_layer=False).items():
        layers = 1 if layer_paths(path) else 0  # a scan takes one layer at a time: that axis stays whole
        spec: PartitionSpec | None = PartitionSpec()
        if isinstance(variable, nnx.Param | QuantizedWeight):
            spec = spread_spec(variable.get_value().shape[layers:], mesh)
            spec = None if spec is None else PartitionSpec(*(None,) * layers, *spec)
        if spec is None:
            whole.append(path)
        shardings[path] = NamedSharding(mesh, spec or PartitionSpec())
    if whole and mesh.size > 1:
        shown = ", ".join(whole[:8]) + (f" and {len(whole) - 8} more" if len(whole) > 8 else "")
        warn(
            f"{len(whole)} parameter(s) have no dimension divisible by {mesh.size} devices and are replicated: {shown}",
            stacklevel=3,
        )
    return shardings


class Placement:
    """Where a module's parameters lie, as one value that compares and hashes: part of the module's definition.

    Args:
        shardings: path → sharding of each parameter, as it is stored.
    """

    def __init__(self, shardings: Mapping[str, NamedSharding]) -> None:
        self._shardings = dict(shardings)
        self._hash = hash(frozenset(self._shardings.items()))  # once: a definition is hashed at each call of a program

    @classmethod
    def of(cls, module: nnx.Module) -> Placement:
        """Note where the parameters of a module lie."""
        arrays = {path: v.get_value() for path, v in named_variables(module, nnx.Param, by_layer=False).items()}
        placed = {path: array.sharding for path, array in arrays.items()}
        return cls({path: sharding for path, sharding in placed.items() if isinstance(sharding, NamedSharding)})

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Placement) and self._shardings == other._shardings)

    def __hash__(self) -> int:
        return self._hash

    def hold(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Put each leaf of a tree like `params` where the parameter lies; under a transformation, ask the compiler to.

        A leaf that the placement does not know, or whose shape its axes no longer divide, is left to the compiler.
        """
        return nest({path: self._held(path, leaf) for path, leaf in flatten(tree, by_layer=False).items()})

    def hold_module(self, module: nnx.Module) -> None:
        """Ask it for the parameters of a module under a transformation, and so for their gradients."""
        for path, variable in named_variables(module, nnx.Param, by_layer=False).items():
            if isinstance(value := variable.get_value(), jax.core.Tracer):
                variable.set_value(self._held(path, value))

    def _held(self, path: str, leaf: jax.Array) -> jax.Array:
        sharding = self._shardings.get(path)
        if sharding is None or len(sharding.spec) > leaf.ndim:
            return leaf
        spec = fit_spec(sharding.spec, leaf.shape, sharding.mesh, path=path)
        fitted = NamedSharding(sharding.mesh, spec)
        return (
            jax.lax.with_sharding_constraint(leaf, fitted) if isinstance(leaf, jax.core.Tracer) else place(leaf, fitted)
        )


def apply_to_arrays(module: nnx.Module, function: Callable[[str, Any], Any]) -> None:
    """Replace each array, as it is stored, by `function(path, array)`, one after the other (little extra memory)."""
    for path, variable in named_variables(module, by_layer=False).items():
        variable.set_value(function(path, variable.get_value()))
    for path, (node, name) in plain_arrays(module).items():
        setattr(node, name, nnx.data(function(path, getattr(node, name))))


def placers(shardings: Mapping[str, Any]) -> dict[str, Callable[[Any], jax.Array]]:
    """Return path → function that puts an array where its sharding says."""
    return {path: Placer(sharding) for path, sharding in shardings.items()}


@dataclass(frozen=True)
class Placer:
    """A function that puts an array where `sharding` says."""

    sharding: Any

    def __call__(self, array: Any) -> jax.Array:
        """Return the array there."""
        return place(array, self.sharding)

    def of_layer(self, index: int) -> Placer:
        """Return the function for one layer of a stack's."""
        return Placer(layer_of(self.sharding, index))


def apply_to_tree(module: Any, tree: Any, rules: PartitionRules, mesh: Mesh, *, is_gather: bool) -> Any:
    """Return a new tree of the same kind (nested dict or `nnx.State`) with every leaf sharded, or gathered."""
    flat = flatten(tree, by_layer=False)
    if is_gather:
        moved = {path: gather(leaf) for path, leaf in flat.items()}
    else:
        lora = {path: match for path, (_, match) in lora_matches(module, rules).items() if path in flat}
        matches = find_matches(rules, {path: leaf for path, leaf in flat.items() if path not in lora}) | lora
        specs = {path: match.spec for path, match in matches.items()}
        shardings = named_shardings(specs, flat, mesh, rules=matches)
        moved = {path: place(leaf, shardings[path]) for path, leaf in flat.items()}
    return to_state(nest(moved)) if isinstance(tree, nnx.State) else nest(moved)
