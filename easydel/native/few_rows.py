"""A few rows times a matrix, at the memory's speed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library
from easydel.native.slices import are_sliced, slice_of

MOST_ROWS = 4
LEAST_BYTES = 256 << 10
"""Where XLA's product takes over: more rows, or a kernel so small that dividing it among threads does not pay."""


def serves_few_rows(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `few_rows` is the better way to multiply `[rows, in]` by `[in, out]` where both are on a CPU."""
    return (
        x.dtype == kernel.dtype == jnp.float32
        and 0 < x.shape[0] <= MOST_ROWS
        and kernel.size * 4 >= LEAST_BYTES
        and (not are_sliced() or slice_of(kernel) is not None)
        and library.is_available()
    )


def few_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply a few rows by a matrix.

    Args:
        x: float32 `[rows, in]`.
        kernel: float32 `[in, out]`.

    Returns:
        float32 `[rows, out]`, summed in float32; elsewhere than on a CPU, XLA's product.
    """
    found = slice_of(kernel)
    if found is None:
        return _few_rows(x, kernel[None], jnp.int32(0))
    return _few_rows(x, found.stack, found.place)


@jax.custom_jvp
def _few_rows(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, stack, place, cpu=_native, default=_product)


@_few_rows.defjvp
def _few_rows_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (x, stack, place), (x_dot, stack_dot, _) = primals, tangents
    return _few_rows(x, stack, place), _product(x_dot, stack, place) + _product(x, stack_dot, place)


def _product(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    return x @ jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)


def _native(x: jax.Array, stack: jax.Array, place: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], stack.shape[2]), jnp.float32)
    return jax.ffi.ffi_call("easydel_few_rows", result, vmap_method="sequential")(x, stack, place)
