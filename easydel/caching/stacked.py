"""The caches of layers that run in a scan: those of equal layers as one, with a leading axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from easydel.stacked import layer_of, range_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedCaches:
    """Caches of all layers of a stack; `caches[5]` is a copy of layer 5's.

    Attributes:
        stacks: name of a range of layers (`"0:8:2"`) → their caches as one, each array `[layers, …]`.
    """

    stacks: dict[str, Any]

    @property
    def keeps_slots(self) -> bool:
        """Whether single slots are looked back at."""
        return any(getattr(cache, "keeps_slots", True) for cache in self.stacks.values())

    def grow(self, max_length: int) -> StackedCaches:
        """Return the caches with room for `max_length` positions."""
        return self._each(lambda cache: cache.grow(max_length))

    def crop(self, length: int, index: int) -> StackedCaches:
        """Return the caches without the slots from `length` on, of `index` written."""
        return self._each(lambda cache: cache.crop(length, index))

    def shift(self, by: Any) -> StackedCaches:
        """Return the caches with all that they hold `by` slots further right."""
        return self._each(lambda cache: cache.shift(by))

    def insert(self, other: StackedCaches, row: Any) -> StackedCaches:
        """Return the caches with `other`'s only row in place of a row, int32 `[]`."""
        return jax.tree.map(lambda kept, new: jax.lax.dynamic_update_slice_in_dim(kept, new, row, 1), self, other)

    def reorder(self, rows: jax.Array) -> StackedCaches:
        """Return the caches of the rows named, int32 `[new batch]`; see `Cache.reorder`."""
        return StackedCaches(jax.tree.map(lambda kept: kept[:, rows], self.stacks))

    def _each(self, change: Callable[[Any], Any]) -> StackedCaches:
        return StackedCaches({name: jax.vmap(change)(stack) for name, stack in self.stacks.items()})

    def __len__(self) -> int:
        return sum(len(range_of(name)) for name in self.stacks)

    def __getitem__(self, layer: int) -> Any:
        for name, stack in self.stacks.items():
            if layer in range_of(name):
                return jax.tree.map(functools.partial(layer_of, index=range_of(name).index(layer)), stack)
        raise IndexError(f"layer {layer} of {len(self)}")

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(len(self)))


def repeated(make: Callable[[], Any], count: int) -> Any:
    """Return what `make` gives, `count` times along a new leading axis."""
    return jax.vmap(lambda _: make(), axis_size=count, in_axes=None)(None)
