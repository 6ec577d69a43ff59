"""A few rows times a matrix, at the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library
from easydel.native.slices import are_sliced, slice_of, taken

MOST_ROWS = 32
LEAST_BYTES = 256 << 10
"""Where XLA's product takes over: more rows, or kernels so small that dividing them among threads does not pay."""


def serves_few_rows(x: jax.Array, kernels: Sequence[jax.Array]) -> bool:
    """Whether `few_rows` is the better way to multiply `[rows, in]` by `[in, out]` where all are on a CPU."""
    return (
        all(array.dtype == jnp.float32 for array in (x, *kernels))
        and 0 < x.shape[0] <= MOST_ROWS
        and sum(kernel.size for kernel in kernels) * 4 >= LEAST_BYTES
        and (not are_sliced() or all(slice_of(kernel) is not None for kernel in kernels))
        and library.is_available()
    )


def few_rows(x: jax.Array, kernels: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Multiply a few rows by matrices, all of them in one call where that can be.

    Args:
        x: float32 `[rows, in]`.
        kernels: float32 `[in, out]` each.

    Returns:
        float32 `[rows, out]` for each, summed in float32; elsewhere than on a CPU, XLA's product.
    """
    found = [slice_of(kernel) for kernel in kernels]
    if all(entry is None for entry in found):
        return _few_rows(x, jnp.int32(0), *(kernel[None] for kernel in kernels))
    first = found[0]
    if first is None or any(entry is None or entry.place is not first.place for entry in found):
        return tuple(few_rows(x, [kernel])[0] for kernel in kernels)
    return _few_rows(x, first.place, *(entry.stack for entry in found if entry is not None))


@jax.custom_jvp
def _few_rows(x: jax.Array, place: jax.Array, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    return jax.lax.platform_dependent(x, place, *stacks, cpu=_native, default=_products)


@_few_rows.defjvp
def _few_rows_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (x, place, *stacks), (x_dot, _, *stack_dots) = primals, tangents
    by_x, by_stacks = _products(x_dot, place, *stacks), _products(x, place, *stack_dots)
    return _few_rows(x, place, *stacks), tuple(a + b for a, b in zip(by_x, by_stacks, strict=True))


def _products(x: jax.Array, place: jax.Array, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x @ taken(stack, place) for stack in stacks)


def _native(x: jax.Array, place: jax.Array, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    results = [jax.ShapeDtypeStruct((x.shape[0], stack.shape[2]), jnp.float32) for stack in stacks]
    return tuple(jax.ffi.ffi_call("easydel_few_rows", results, vmap_method="sequential")(x, place, *stacks))
