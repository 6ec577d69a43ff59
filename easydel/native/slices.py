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


def slice_of(array: jax.Array) -> Slice | None:
    """Return what is known of an array; `None`: nothing."""
    return (_SLICES.get() or {}).get(id(array))
