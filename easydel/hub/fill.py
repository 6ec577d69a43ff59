"""From arrays by path to a module's variables, stacks of layers included."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easydel.stacked import Held, LayerVariable


class Filler:
    """Takes arrays one after the other; a layer of a stack is written into its place as soon as it is there.

    So no device ever holds more than its share and one layer's.

    Args:
        variables: of the abstract module, layer by layer.
        placements: id of a stacked variable → where it goes; those left out go to the default device.
    """

    def __init__(self, variables: Mapping[str, Held], placements: Mapping[int, jax.sharding.Sharding]) -> None:
        self._variables, self._placements = variables, placements
        self._arrays: dict[str, jax.Array] = {}
        self._stacks: dict[int, jax.Array] = {}

    def put(self, path: str, array: jax.Array) -> None:
        """Take a variable's array, where it belongs and in its type."""
        variable = self._variables[path]
        if not isinstance(variable, LayerVariable):
            self._arrays[path] = array
            return
        key = id(variable.stack)
        if key not in self._stacks:
            shape = (variable.stack.get_value().shape[0], *array.shape)
            self._stacks[key] = _empty(shape, array.dtype, self._placements.get(key))
        # Blocked on, or the layers of a whole model would queue up faster than they are written.
        self._stacks[key] = jax.block_until_ready(_written(self._stacks[key], array, variable.index))

    def finish(self) -> None:
        """Put everything into the variables."""
        for path, array in self._arrays.items():
            self._variables[path].set_value(array)
        for variable in self._variables.values():
            if isinstance(variable, LayerVariable) and id(variable.stack) in self._stacks:
                variable.stack.set_value(self._stacks.pop(id(variable.stack)))


def common_dtypes(variables: Mapping[str, Held], dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Give all layers of a stack one type, that which loses nothing of any."""
    common: dict[int, Any] = {}
    for path, variable in variables.items():
        if isinstance(variable, LayerVariable):
            key = id(variable.stack)
            common[key] = _wider(common.get(key, dtypes[path]), dtypes[path])
    return {
        path: common[id(variable.stack)] if isinstance(variable, LayerVariable) else dtypes[path]
        for path, variable in variables.items()
    }


def _wider(one: Any, other: Any) -> Any:
    return one if one == other else jnp.promote_types(one, other)


def _empty(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    make = functools.partial(jnp.zeros, shape, dtype)
    return make() if sharding is None else jax.jit(make, out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _written(stack: jax.Array, array: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, array, index, 0)
