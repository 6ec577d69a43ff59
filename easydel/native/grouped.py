"""Groups of rows, each times a matrix of its own, as the experts of a mixture need it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library
from easydel.native.slices import stack_of, taken


def serves_grouped(x: jax.Array, kernels: jax.Array) -> bool:
    """Whether `grouped` can multiply `[rows, in]` by `[groups, in, out]` on a CPU."""
    return x.dtype == kernels.dtype == jnp.float32 and x.size > 0 and library.is_available()


def grouped(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply the first `sizes[0]` rows by `kernels[0]`, the next `sizes[1]` by `kernels[1]`, and so on.

    Differentiable once, in reverse, by `x` and `kernels`. A kernel without rows is not read; kernels that are a slice
    of a stack (`easydel.native.slices`) are read from the stack.

    Args:
        x: float32 `[rows, in]`.
        kernels: float32 `[groups, in, out]`.
        sizes: int32 `[groups]`; their sum is at most `rows`.

    Returns:
        float32 `[rows, out]`; 0 for rows beyond the sum. Elsewhere than on a CPU, XLA's grouped product.
    """
    return _grouped(x, *stack_of(kernels), sizes)


@jax.custom_vjp
def _grouped(x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, stack, place, sizes, cpu=grouped_call, default=_elsewhere)


def grouped_call(
    x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array, transposed: bool = False
) -> jax.Array:
    """Call the kernel: `grouped` of the kernels `stack[place]`, or of their transposes; only on a CPU."""
    result = jax.ShapeDtypeStruct((x.shape[0], stack.shape[2 if transposed else 3]), jnp.float32)
    call = jax.ffi.ffi_call("easydel_grouped", result, vmap_method="sequential")
    return call(x, stack, place, sizes, transposed=transposed)


def _elsewhere(x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, taken(stack, place), sizes)


Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _gradients(x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array, gradient: jax.Array) -> Any:
    result = jax.ShapeDtypeStruct(stack.shape[1:], jnp.float32)
    outer = jax.ffi.ffi_call("easydel_grouped_outer", result, vmap_method="sequential")
    return grouped_call(gradient, stack, place, sizes, transposed=True), outer(x, gradient, sizes)


def _gradients_elsewhere(
    x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array, gradient: jax.Array
) -> Any:
    _, pull = jax.vjp(lambda x, kernels: jax.lax.ragged_dot(x, kernels, sizes), x, taken(stack, place))
    return pull(gradient)


def _forward(x: jax.Array, stack: jax.Array, place: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Kept]:
    return _grouped(x, stack, place, sizes), (x, stack, place, sizes)


def _backward(kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    d_x, d_kernels = jax.lax.platform_dependent(*kept, gradient, cpu=_gradients, default=_gradients_elsewhere)
    stack, place = kept[1:3]
    if stack.shape[0] == 1:
        return d_x, d_kernels[None], None, None
    return d_x, jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(stack), d_kernels, place, 0), None, None


_grouped.defvjp(_forward, _backward)
