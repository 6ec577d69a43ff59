"""Groups of rows, each times a quantized weight of its own, as the experts of a mixture need it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from easydel.native import library, quantized_forms
from easydel.native.codes import Kind, dequantize
from easydel.native.quantized import GROUP_MULTIPLE, MOST_ROWS, call_floats, call_integers, stack_of


def serves_quantized_groups(
    x: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, *, kind: Kind, group_size: int
) -> bool:
    """Whether a kernel multiplies `x [rows, in]` by these weights where all are on a CPU.

    Groups of a multiple of 16 inputs, or one that has them all; a processor with AVX2.
    """
    check_groups(x, codes, scales, sizes, kind, group_size)
    is_even = group_size % GROUP_MULTIPLE == 0 or scales.shape[2] <= 1
    return x.size > 0 and is_even and library.serves_quantized()


def quantized_groups(
    x: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, *, kind: Kind, group_size: int
) -> jax.Array:
    """Multiply the first `sizes[0]` rows by the first weight, the next `sizes[1]` by the second, and so on.

    The codes of a weight without rows are not read by the kernel. Differentiable nowhere: see
    `easydel.quantization.expert_products`.

    Args:
        x: floating `[rows, in]`.
        codes: as `easydel.native.quantized` says, of each weight: `[weights, out, bytes]`.
        scales: float32 `[weights, out, groups]`.
        sizes: int32 `[weights]`; their sum is at most `rows`.
        kind: `"int8"`, `"int4"` or `"nf4"`.
        group_size: inputs that share a scale.

    Returns:
        `[rows, out]` in x's dtype, summed in float32; 0 for rows beyond the sum of sizes.

    Raises:
        ValueError: the arrays do not belong together.
    """
    form = functools.partial(_form, kind=kind, group_size=group_size)
    native = functools.partial(call_floats, kind=kind, group_size=group_size)
    return _groups(native, form, x.astype(jnp.float32), codes, scales, sizes, kind, group_size).astype(x.dtype)


def integer_groups(
    x: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, *, kind: Kind, group_size: int
) -> jax.Array:
    """Multiply int8 rows by int8 or int4 weights, group by group; else as `quantized_groups`, and `integer_rows`."""
    if kind == "nf4" or x.dtype != jnp.int8:
        raise ValueError(f"got {x.dtype} inputs and {kind} weights: expected int8 inputs and int8 or int4 weights")
    form = functools.partial(_form, kind=kind, group_size=group_size)
    native = functools.partial(call_integers, group_size=group_size)
    return _groups(native, form, x, codes, scales, sizes, kind, group_size)


def _groups(native, form, x, codes, scales, sizes, kind, group_size):  # type: ignore[no-untyped-def]
    """Choose the kernel or XLA's form; both take `(x, codes, scales, place, sizes)`, the first two of a stack."""
    given = (x, *stack_of(codes, scales), sizes)
    if not serves_quantized_groups(x, codes, scales, sizes, kind=kind, group_size=group_size):
        return form(*given)
    return jax.lax.platform_dependent(*given, cpu=native, default=form)


def _form(
    x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array, sizes: jax.Array, kind: Kind, group_size: int
) -> jax.Array:
    """Compute a few rows one by one, which reads the codes of their weights only; more, with weights made whole."""
    ends = jnp.cumsum(sizes)
    if 0 < x.shape[0] <= MOST_ROWS and group_size % 2 == 0 and x.size > 0:
        multiply = quantized_forms.integer_rows if x.dtype == jnp.int8 else quantized_forms.rows
        out = []
        for row in range(x.shape[0]):
            weight = place + jnp.minimum(jnp.sum(ends <= row), sizes.size - 1)
            one, of_one = (jax.lax.dynamic_index_in_dim(part, weight, keepdims=False) for part in (codes, scales))
            out.append(multiply(x[row : row + 1], one, of_one, kind, group_size))
        done = jnp.concatenate(out)
        return jnp.where((jnp.arange(x.shape[0]) < ends[-1])[:, None], done, 0)
    held: Any = (jax.lax.dynamic_slice_in_dim(part, place, sizes.size) for part in (codes, scales))
    weights = dequantize(*held, kind=kind, group_size=group_size, inputs=x.shape[1])
    # A default precision may be less than float32's.
    turned = jnp.swapaxes(weights, 1, 2)
    return jax.lax.ragged_dot(x.astype(jnp.float32), turned, sizes, precision=jax.lax.Precision.HIGHEST)


def check_groups(
    x: jax.Array, codes: jax.Array, scales: jax.Array, sizes: jax.Array, kind: Kind, group_size: int
) -> None:
    """Raise ValueError unless the arrays belong together."""
    if codes.ndim != 3 or scales.ndim != 3 or not codes.shape[0] == scales.shape[0] == sizes.size:
        raise ValueError(
            f"got codes {codes.shape}, scales {scales.shape} and sizes {sizes.shape}: expected [weights, out, …] twice "
            "and one size for each weight"
        )
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes are {sizes.dtype}: expected int32")
    one, of_one = (jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in (codes, scales))
    quantized_forms.check(quantized_forms.inputs_of(x), one, of_one, kind, group_size)
