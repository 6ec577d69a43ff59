"""Equal layers stored stacked, and how they are still spoken of one by one.

A variable that holds one parameter of several layers, along a leading axis, stands under the range of those layers,
written as a slice is: `model/layers/0:8:2/mlp/up_proj/kernel` holds `model/layers/{0,2,4,6}/mlp/up_proj/kernel`. So the
path alone says what is in it, and rules, patterns, weight tables and messages keep naming each layer.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

_RANGE = re.compile(r"(?:^|(?<=/))(\d+):(\d+):(\d+)(?=/|$)")


def range_name(layers: range) -> str:
    """Return the name of a stack of these layers, `start:stop:step`."""
    return f"{layers.start}:{layers.stop}:{layers.step}"


def range_of(name: str) -> range:
    """Return the layers that a stack of this name holds; none if it is no such name."""
    match = _RANGE.fullmatch(name)
    return range(*map(int, match.groups())) if match else range(0)


def layer_paths(path: str) -> list[str] | None:
    """Return the paths of the layers in a stack's path, in order; `None` if the path names no stack."""
    match = _RANGE.search(path)
    if match is None:
        return None
    return [f"{path[: match.start()]}{n}{path[match.end() :]}" for n in range(*map(int, match.groups()))]


@jax.jit
def _taken(stack: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def layer_of(value: Any, index: int) -> Any:
    """Return one layer's part of what belongs to a stack.

    Args:
        value: an array or its shape `[layers, …]`, a spec or sharding of such, or anything with `of_layer(index)`; what
            else there is belongs to each layer.
        index: the layer's place in the stack.
    """
    if isinstance(value, jax.Array):
        return _taken(value, index)  # the index is no constant: one program for all layers
    if isinstance(value, np.ndarray):
        return value[index]
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape[1:], value.dtype, sharding=layer_of(value.sharding, index))
    if isinstance(value, PartitionSpec):
        return PartitionSpec(*tuple(value)[1:])
    if isinstance(value, NamedSharding):
        return NamedSharding(value.mesh, layer_of(value.spec, index), memory_kind=value.memory_kind)
    return value.of_layer(index) if hasattr(value, "of_layer") else value


def stack_values(values: Sequence[Any]) -> Any:
    """Return layers' arrays, or their shapes, as one with a leading axis."""
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        return jax.eval_shape(lambda: jnp.stack([jnp.zeros(value.shape, value.dtype) for value in values]))
    return jnp.stack([jnp.asarray(value) for value in values])


@dataclass(frozen=True)
class LayerVariable:
    """One layer's part of a stacked variable, with the methods of `nnx.Variable` that views need.

    Attributes:
        stack: the variable, `[layers, …]`.
        index: the layer's place in it.
    """

    stack: nnx.Variable
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The layer's shape."""
        return tuple(self.stack.get_value().shape[1:])

    @property
    def dtype(self) -> Any:
        """The storage type."""
        return self.stack.get_value().dtype

    def get_value(self) -> Any:
        """Return the layer's array (a copy) or shape."""
        return layer_of(self.stack.get_value(), self.index)

    def set_value(self, value: Any) -> None:
        """Put the layer's array into the stack; this writes the whole stack anew."""
        self.stack.set_value(self.stack.get_value().at[self.index].set(value))

    def get_metadata(self) -> Any:
        """Return the stack's metadata."""
        return self.stack.get_metadata()


Held = nnx.Variable | LayerVariable
"""A variable, or one layer's part of a stacked one."""


def kind_of(variable: Held) -> type[nnx.Variable]:
    """Return the variable's class, of a layer's part the stack's."""
    return type(variable.stack) if isinstance(variable, LayerVariable) else type(variable)


class Layers(dict[str, Any]):
    """The layers of a tree of parameters, by number, where they are stored stacked.

    `layers["5"]` is made on access, a nested dict of layer 5's arrays; what is stored, and what `jax.tree` and
    optimizers see, are the stacks, by the names of their ranges in `stacks`. It is read only: a layer is changed with
    `merge_params_dict`.
    """

    def __init__(self, stacks: Mapping[str, Any]) -> None:
        super().__init__()
        self.stacks = dict(stacks)

    def _places(self) -> dict[int, tuple[str, int]]:
        return dict(sorted((layer, (name, k)) for name in self.stacks for k, layer in enumerate(range_of(name))))

    def __getitem__(self, key: str) -> Any:
        place = self._places().get(int(key)) if str(key).isdigit() else None
        if place is None:
            raise KeyError(key)
        name, index = place
        return _map(lambda leaf: layer_of(leaf, index), self.stacks[name])

    def get(self, key: str, default: Any = None) -> Any:
        """Return a layer, or `default`."""
        return self[key] if key in self else default  # noqa: SIM401 - this is that very method

    def __iter__(self) -> Iterator[str]:
        return iter([str(layer) for layer in self._places()])

    def __len__(self) -> int:
        return len(self._places())

    def __contains__(self, key: object) -> bool:
        return str(key) in list(self)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """Return the layers' numbers, as strings."""
        return KeysView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return the layers."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return numbers and layers."""
        return ItemsView(self)

    def __repr__(self) -> str:
        return f"Layers({self.stacks!r})"

    def __eq__(self, other: object) -> bool:
        return self.stacks == other.stacks if isinstance(other, Layers) else dict(self.items()) == other

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Layers, (self.stacks,)

    def copy(self) -> Layers:
        """Return another such dict of the same stacks."""
        return Layers(self.stacks)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("layers stored stacked cannot be set one by one here; use merge_params_dict, or jax.tree.map")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree)


def _flatten(layers: Layers) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(sorted(layers.stacks))
    return [layers.stacks[name] for name in names], names


def _flatten_with_keys(layers: Layers) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    children, names = _flatten(layers)
    return [(jax.tree_util.DictKey(name), child) for name, child in zip(names, children, strict=True)], names


def _unflatten(names: tuple[str, ...], children: Iterable[Any]) -> Layers:
    return Layers(dict(zip(names, children, strict=True)))


jax.tree_util.register_pytree_with_keys(Layers, _flatten_with_keys, _unflatten, _flatten)
