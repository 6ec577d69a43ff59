"""A few rows times the rows of a table, as a head tied to the embedding needs it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library
from easydel.native.few_rows import LEAST_BYTES
from easydel.native.slices import are_sliced

MOST_ROWS = 4
"""More rows cost arithmetic instead of memory, which XLA's product is good at."""


def serves_few_dots(x: jax.Array, table: jax.Array) -> bool:
    """Whether `few_dots` is the better way to multiply `[rows, in]` by a table `[length, in]` that is on a CPU."""
    return (
        x.dtype == table.dtype == jnp.float32
        and 0 < x.shape[0] <= MOST_ROWS
        and table.size * 4 >= LEAST_BYTES
        and not are_sliced()
        and library.is_available()
    )


@jax.custom_jvp
def few_dots(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiply a few rows by each row of a table.

    Args:
        x: float32 `[rows, in]`.
        table: float32 `[length, in]`.

    Returns:
        float32 `[rows, length]`, summed in float32; elsewhere than on a CPU, XLA's product.
    """
    return jax.lax.platform_dependent(x, table, cpu=_native, default=_product)


@few_dots.defjvp
def _few_dots_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    (x, table), (x_dot, table_dot) = primals, tangents
    return few_dots(x, table), _product(x_dot, table) + _product(x, table_dot)


def _product(x: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("vh,rh->vr", table, x).T  # XLA on CPUs takes a table first: half the time


def _native(x: jax.Array, table: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("easydel_few_dots", result, vmap_method="sequential")(x, table)
