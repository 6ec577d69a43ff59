"""Modules that are trained whole beside adapters (PEFT's `modules_to_save`): a new head, an embedding.

Their parameters are marked, so that whoever asks for what an adapter learns finds them; the numbers that they had
without the adapter lie on the model's shelf.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.paths import matching, named_modules, named_variables
from easydel.stacked import layer_paths

_MARK = "learned_with_adapter"


def is_saved(variable: nnx.Variable) -> bool:
    """Whether a variable is a parameter of a module that is trained whole with the adapter that layers carry."""
    return bool(variable.get_metadata().get(_MARK, False))


def saved_variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return path → such parameter of a module, as it is stored."""
    found = named_variables(module, nnx.Param, by_layer=False)
    return {path: variable for path, variable in found.items() if is_saved(variable)}


def saved_modules(module: nnx.Module, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the modules that patterns choose, of nested ones the outermost.

    Raises:
        ValueError: a pattern matches no module; the nearest are named.
    """
    paths = [path for path in named_modules(module) if path]
    found = {path for pattern in patterns for path in matching(pattern, paths, what="module")}
    return [path for path in paths if path in found and not is_inside(path, found - {path})]


def is_inside(path: str, modules: Collection[str]) -> bool:
    """Whether a path is that of one of some modules, or of what one holds."""
    return any(path == outer or path.startswith(f"{outer}/") for outer in modules)


def chosen_variables(module: nnx.Module, patterns: Sequence[str]) -> dict[str, nnx.Variable]:
    """Return stored path → parameter of the modules that patterns choose.

    Raises:
        ValueError: a pattern matches no module.
        UnsupportedError: a module without float parameters, as quantized ones are, or some layers of a stack only.
    """
    if not patterns:
        return {}
    modules, found = saved_modules(module, patterns), {}
    held = set()
    for path, variable in named_variables(module, nnx.Param, by_layer=False).items():
        layers = layer_paths(path) or [path]
        inside = [layer for layer in layers if is_inside(layer, modules)]
        if isinstance(variable, nnx.LoRAParam) or not inside:
            continue
        if len(inside) < len(layers):
            raise UnsupportedError(
                f"modules_to_save: some of the layers that are stored stacked are not supported ({inside[0]} is meant, "
                "but not all of them): build the model with scan_layers=False"
            )
        held |= {outer for outer in modules if any(is_inside(layer, [outer]) for layer in layers)}
        found[path] = variable
    if empty := [path for path in modules if path not in held]:
        raise UnsupportedError(
            f"modules_to_save: training {empty[0]} whole is not supported, it has no parameters of its own (or is "
            "quantized); choose another module"
        )
    return found


def mark(variables: Mapping[str, nnx.Variable], arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Mark parameters and give them numbers; return those that they had."""
    before = {}
    for path, variable in variables.items():
        held = before[path] = variable.get_value()
        # A copy: training may donate what the model holds, and the base's numbers must outlive that.
        variable.set_value(like(held, arrays[path]) if path in arrays else jnp.array(held, copy=True))
        variable.set_metadata(_MARK, True)
    return before


def unmark(variables: Mapping[str, nnx.Variable], arrays: Mapping[str, jax.Array] | None) -> None:
    """Take the marks away; give the parameters these numbers, or leave them those they have (`None`)."""
    for path, variable in variables.items():
        variable.del_metadata(_MARK)
        if arrays is not None:
            variable.set_value(like(variable.get_value(), arrays[path]))


def values(variables: Mapping[str, nnx.Variable]) -> dict[str, jax.Array]:
    """Return path → array."""
    return {path: variable.get_value() for path, variable in variables.items()}


def exchange(variables: Mapping[str, nnx.Variable], arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Give parameters other numbers; return those that they had."""
    before = values(variables)
    for path, variable in variables.items():
        variable.set_value(like(before[path], arrays[path]))
    return before


def like(held: jax.Array, array: jax.Array) -> jax.Array:
    """Return an array in the type of another one, where that one lies."""
    if isinstance(held, jax.Array) and not isinstance(held, jax.core.Tracer):
        return jax.device_put(jnp.asarray(array, held.dtype), held.sharding)
    return jnp.asarray(array, held.dtype)


def check_saved(arrays: Mapping[str, jax.Array], variables: Mapping[str, nnx.Variable]) -> None:
    """Raise `ValueError` if arrays are not, by path and shape, ones of these parameters."""
    problems = [f"{path}: no parameter of modules_to_save" for path in arrays.keys() - variables.keys()]
    for path in arrays.keys() & variables.keys():
        got, wanted = tuple(arrays[path].shape), tuple(variables[path].get_value().shape)
        if got != wanted:
            problems.append(f"{path}: expected {wanted}, got {got}")
    if problems:
        raise ValueError("these modules_to_save do not fit the model:\n  " + "\n  ".join(sorted(problems)))
