"""What the base class shows of its variables, and how it takes them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from easydel.paths import each_layer, flatten, named_modules, named_variables, nearest
from easydel.stacked import Held, LayerVariable, stack_values


def param_arrays(module: nnx.Module) -> dict[str, jax.Array]:
    """Return path → parameter array (no copies); layers stored stacked stand under their range."""
    return {path: v.get_value() for path, v in named_variables(module, nnx.Param, by_layer=False).items()}


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array, with its sharding if it lies on a mesh."""
    sharding = getattr(array, "sharding", None)
    return jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None
    )


def merge_params(module: nnx.Module, tree: Mapping[Any, Any] | nnx.State) -> None:
    """Put a (partial) tree of parameters in place; layers may be stacked in it or in the module, in both or neither.

    Raises:
        ValueError: unknown paths, wrong shapes, or integers for a float parameter; all listed, nothing changed.
    """
    variables: dict[str, Held] = named_variables(module, nnx.Param, by_layer=False)
    new = flatten(tree, by_layer=False)
    if new.keys() - variables.keys():  # not stacked as here
        variables |= named_variables(module, nnx.Param)
        new = {
            p: x
            for path, x in new.items()
            for p, x in ({path: x} if path in variables else each_layer({path: x})).items()
        }
    problems = []
    for path, value in new.items():
        if path not in variables:
            near = nearest(path, variables)
            problems.append(f"{path}: the model has no such parameter{f' (nearest: {near[0]})' if near else ''}")
            continue
        held = variables[path]
        if jnp.shape(value) != tuple(held.shape):
            problems.append(f"{path}: expected shape {tuple(held.shape)}, got {jnp.shape(value)}")
        elif is_float(held) and not is_float(value):
            problems.append(f"{path}: expected floating-point values, got {jnp.result_type(value)}")
    if problems:
        raise ValueError("these parameters cannot be merged:\n  " + "\n  ".join(problems))
    set_values({path: (variables[path], value) for path, value in new.items()})


def set_values(new: Mapping[str, tuple[Held, Any]]) -> None:
    """Put arrays into variables, by path; each stack of layers is written once, however many of its layers are new."""
    parts: dict[int, dict[int, Any]] = {}
    stacks: dict[int, nnx.Variable] = {}
    for variable, value in new.values():
        if isinstance(variable, LayerVariable):
            stacks[id(variable.stack)] = variable.stack
            parts.setdefault(id(variable.stack), {})[variable.index] = value
        else:
            variable.set_value(_placed_like(variable.get_value(), value))
    for key, stack in stacks.items():
        layers, held = parts[key], stack.get_value()
        indexes = sorted(layers)
        values = stack_values([layers[index] for index in indexes])
        if len(layers) < held.shape[0]:  # the others keep their numbers, and all the type they are stored in
            values = held.at[jnp.asarray(indexes)].set(values.astype(held.dtype))
        stack.set_value(_placed_like(held, values))


def _placed_like(held: Any, value: Any) -> Any:
    """Return a new parameter, where the old one is bound to be if the new one lies on a single device, or anywhere."""
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        return value
    array = jnp.asarray(value)
    sharding = getattr(held, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and len(array.sharding.device_set) == 1
    # What is bound to a device and what is not would each be compiled for.
    is_loose = getattr(held, "committed", False) and not array.committed
    return jax.device_put(array, sharding) if on_mesh or is_loose else array


def is_float(value: Any) -> bool:
    """Whether an array or dtype holder is floating point."""
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def cast(module: nnx.Module, dtype: Any) -> None:
    """Store floating parameters in `dtype` and have every submodule compute in it.

    Raises:
        ValueError: `dtype` is not a floating-point type.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"to_dtype takes a floating-point dtype such as jnp.bfloat16, got {dtype}")
    for variable in named_variables(module, nnx.Param, by_layer=False).values():
        value = variable.get_value()
        if not is_float(value) or value.dtype == dtype:
            continue
        if isinstance(value, jax.ShapeDtypeStruct):
            variable.set_value(jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding))
        else:
            variable.set_value(value.astype(dtype))
    for submodule in named_modules(module, by_layer=False).values():
        for name in {"dtype", "param_dtype"} & vars(submodule).keys():
            setattr(submodule, name, dtype)
