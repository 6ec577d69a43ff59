"""Groups of rows, each times a matrix of its own, as the experts of a mixture need it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from easydel.native import library


def serves_grouped(x: jax.Array, kernels: jax.Array) -> bool:
    """Whether `grouped` can multiply `[rows, in]` by `[groups, in, out]` on a CPU."""
    return x.dtype == kernels.dtype == jnp.float32 and x.size > 0 and library.is_available()


@jax.custom_vjp
def grouped(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply the first `sizes[0]` rows by `kernels[0]`, the next `sizes[1]` by `kernels[1]`, and so on.

    Differentiable once, in reverse, by `x` and `kernels`. A kernel without rows is not read.

    Args:
        x: float32 `[rows, in]`.
        kernels: float32 `[groups, in, out]`.
        sizes: int32 `[groups]`; their sum is at most `rows`.

    Returns:
        float32 `[rows, out]`; 0 for rows beyond the sum. Elsewhere than on a CPU, XLA's grouped product.
    """
    return jax.lax.platform_dependent(x, kernels, sizes, cpu=_product, default=jax.lax.ragged_dot)


def _product(x: jax.Array, kernels: jax.Array, sizes: jax.Array, transposed: bool = False) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], kernels.shape[1 if transposed else 2]), jnp.float32)
    call = jax.ffi.ffi_call("easydel_grouped", result, vmap_method="sequential")
    return call(x, kernels, sizes, transposed=transposed)


def _gradients(x: jax.Array, kernels: jax.Array, sizes: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = jax.ShapeDtypeStruct(kernels.shape, jnp.float32)
    outer = jax.ffi.ffi_call("easydel_grouped_outer", result, vmap_method="sequential")
    return _product(gradient, kernels, sizes, transposed=True), outer(x, gradient, sizes)


def _gradients_elsewhere(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(lambda x, kernels: jax.lax.ragged_dot(x, kernels, sizes), x, kernels)
    return pull(gradient)


def _backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    d_x, d_kernels = jax.lax.platform_dependent(*kept, gradient, cpu=_gradients, default=_gradients_elsewhere)
    return d_x, d_kernels, None


grouped.defvjp(lambda x, kernels, sizes: (grouped(x, kernels, sizes), (x, kernels, sizes)), _backward)
