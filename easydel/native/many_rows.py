"""Many rows times a matrix, on a processor's matrix unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library
from easydel.native.few_rows import MOST_ROWS
from easydel.native.grouped import grouped_call
from easydel.native.slices import are_sliced, slice_of, stack_of, taken

LEAST_WORK = 1 << 21
"""Multiplications from which on the kernel is faster than XLA's product: before that, threads wait for each other."""


def serves_many_rows(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `many_rows` is the better way to multiply `[rows, in]` by `[in, out]` where both are on a CPU."""
    return (
        x.dtype == kernel.dtype == jnp.float32
        and x.shape[0] > MOST_ROWS
        and x.shape[0] * kernel.size >= LEAST_WORK
        and (not are_sliced() or slice_of(kernel) is not None)
        and library.has_matrix_unit()
    )


def many_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply many rows by a matrix.

    Args:
        x: float32 `[rows, in]`.
        kernel: float32 `[in, out]`.

    Returns:
        float32 `[rows, out]`, summed in float32; elsewhere than on a CPU, XLA's product.
    """
    return _many_rows(x, *stack_of(kernel))


@jax.custom_jvp
def _many_rows(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, stack, place, cpu=_native, default=_product)


@_many_rows.defjvp
def _many_rows_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    (x, stack, place), (x_dot, stack_dot, _) = primals, tangents
    return _many_rows(x, stack, place), _product(x_dot, stack, place) + _product(x, stack_dot, place)


def _product(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    return x @ taken(stack, place)


def _native(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    return grouped_call(x, stack[:, None], place, jnp.int32([x.shape[0]]))
