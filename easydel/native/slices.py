"""What kernels know of arrays that are slices of larger ones: where in the stack they lie.

A kernel of ours would need a copy of a slice, which costs as much as the product. Told of the stack, it reads the
slice's part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slice(NamedTuple):
    """An array that is one of a stack's: `array` is `stack[place]`."""

    array: jax.Array
    stack: jax.Array
    place: jax.Array


_SLICES: ContextVar[Mapping[int, Slice] | None] = ContextVar("easydel_slices", default=None)


@contextlib.contextmanager
def kernels_are_sliced(slices: Iterable[Slice]) -> Iterator[None]:
    """Say that inside the block kernels are slices of larger arrays, as those in a scan are.

    Products with those of `slices` read them from their stacks. `few_rows` leaves others to XLA, which reads them where
    they lie.
    """
    token = _SLICES.set({id(entry.array): entry for entry in slices})
    try:
        yield
    finally:
        _SLICES.reset(token)


def are_sliced() -> bool:
    """Whether kernels are slices here."""
    return _SLICES.get() is not None


def stack_of(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a stack and the place of an array in it: of one that is no slice, a stack of itself alone."""
    found = slice_of(array)
    return (array[None], jnp.int32(0)) if found is None else (found.stack, found.place)


def taken(stack: jax.Array, place: jax.Array) -> jax.Array:
    """Return what is at a place of a stack: where it is not a kernel of ours that reads it there."""
    return jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)


def slice_of(array: jax.Array) -> Slice | None:
    """Return what is known of an array; `None`: nothing."""
    return (_SLICES.get() or {}).get(id(array))
