"""Kernels in C++ for CPUs: an optional part of the package, built when it is installed.

Without them (no compiler, another platform, `EASYDEL_NATIVE=0`) everything works the same by XLA alone, only slower.
Each kernel has an XLA form of the same result; `jax.lax.platform_dependent` takes the kernel where a program is
compiled for a CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

import jax
import jax.numpy as jnp

from easydel.native.build import LIBRARY

MOST_ROWS = 4
LEAST_BYTES = 256 << 10
"""Where XLA's product takes over: more rows, or a kernel so small that dividing it among threads does not pay."""


@functools.cache
def is_available() -> bool:
    """Whether the kernels were built, fit the installed jaxlib and are not switched off by `EASYDEL_NATIVE=0`."""
    if os.environ.get("EASYDEL_NATIVE") == "0" or not LIBRARY.exists():
        return False
    try:
        library = ctypes.CDLL(str(LIBRARY))
        handler = jax.ffi.pycapsule(library.easydel_few_rows)
        jax.ffi.register_ffi_target("easydel_few_rows", handler, platform="cpu")
    except Exception as error:  # of several kinds, as the loader or jaxlib says no
        warnings.warn(
            f"{LIBRARY.name} does not fit this machine or jaxlib ({error}): decoding runs without it; install easydel "
            "again, or run python -m easydel.native.build",
            stacklevel=2,
        )
        return False
    return True


def serves(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `few_rows` is the better way to multiply `[rows, in]` by `[in, out]` where both are on a CPU."""
    return (
        x.dtype == kernel.dtype == jnp.float32
        and 0 < x.shape[0] <= MOST_ROWS
        and kernel.size * 4 >= LEAST_BYTES
        and is_available()
    )


@jax.custom_jvp
def few_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply a few rows by a matrix at the memory's speed.

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
