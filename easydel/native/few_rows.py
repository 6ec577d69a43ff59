"""A few rows times a matrix, at the memory's speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from easydel.native import library

MOST_ROWS = 4
LEAST_BYTES = 256 << 10
"""Where XLA's product takes over: more rows, or a kernel so small that dividing it among threads does not pay."""


_SLICED: ContextVar[bool] = ContextVar("easydel_kernels_are_sliced", default=False)


@contextlib.contextmanager
def kernels_are_sliced() -> Iterator[None]:
    """Leave products to XLA inside the block, because kernels are slices of larger arrays, as those in a scan are.

    Ours would need a copy of each slice first, which costs more than the product; XLA reads it where it lies.
    """
    token = _SLICED.set(True)
    try:
        yield
    finally:
        _SLICED.reset(token)


def serves_few_rows(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `few_rows` is the better way to multiply `[rows, in]` by `[in, out]` where both are on a CPU."""
    return (
        x.dtype == kernel.dtype == jnp.float32
        and 0 < x.shape[0] <= MOST_ROWS
        and kernel.size * 4 >= LEAST_BYTES
        and not _SLICED.get()
        and library.is_available()
    )


@jax.custom_jvp
def few_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply a few rows by a matrix.

    Args:
        x: float32 `[rows, in]`.
        kernel: float32 `[in, out]`.

    Returns:
        float32 `[rows, out]`, summed in float32; elsewhere than on a CPU, XLA's product.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_native, default=jnp.matmul)


@few_rows.defjvp
def _few_rows_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    return few_rows(x, kernel), x_dot @ kernel + x @ kernel_dot


def _native(x: jax.Array, kernel: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("easydel_few_rows", result, vmap_method="sequential")(x, kernel)
