"""Products with quantized weights: a few rows at the speed at which memory gives the codes.

The layout of the weights of a layer `in → out`, transposed as torch has them:

- `int8`: codes int8 `[out, in]`, value = code * scale;
- `nf4`, `int4`: codes uint8 `[out, ceil(in / 2)]`, the even input in the high nibble; value = NF4[code] * scale, or
  the nibble in two's complement * scale;
- scales float32 `[out, ceil(in / group_size)]`; the last group may be shorter.

Of weights that are slices of stacks (`easydel.native.slices`) the kernels read the stacks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from easydel.native import library, quantized_forms
from easydel.native.codes import Kind, dequantize, table
from easydel.native.slices import slice_of, taken

MOST_ROWS = 8
"""Where dequantizing pays: more rows than these share the work."""
GROUP_MULTIPLE = 16


def serves_quantized_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int) -> bool:
    """Whether a kernel multiplies `x [rows, in]` by these weights where all are on a CPU.

    Up to 8 rows; groups of a multiple of 16 inputs, or one group that has them all; a processor with AVX2. `x` is
    float32 or bfloat16 for `quantized_rows`, int8 for `integer_rows`.
    """
    quantized_forms.check(quantized_forms.inputs_of(x), codes, scales, kind, group_size)
    return (
        0 < x.shape[0] <= MOST_ROWS
        and (group_size % GROUP_MULTIPLE == 0 or scales.shape[1] <= 1)
        and library.serves_quantized()
    )


def quantized_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int) -> jax.Array:
    """Multiply rows by quantized weights, accumulating in float32.

    `y[r, o] = Σ_g scale[o, g] Σ_{i in g} x[r, i] value(code[o, i])`. Differentiable by `x` and `scales`. What no kernel
    serves, and what is elsewhere than on a CPU, XLA computes: a few rows without making the float weights whole.

    Args:
        x: floating `[rows, in]`.
        codes: as the module says.
        scales: float32 `[out, groups]`.
        kind: `"int8"`, `"int4"` or `"nf4"`.
        group_size: inputs that share a scale.

    Returns:
        `[rows, out]` in x's dtype.

    Raises:
        ValueError: the arrays do not belong together.
    """
    quantized_forms.check(quantized_forms.inputs_of(x), codes, scales, kind, group_size)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: expected floats; int8 inputs go to integer_rows")
    return _rows(x.astype(jnp.float32), *stack_of(codes, scales), kind, group_size).astype(x.dtype)


def integer_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int) -> jax.Array:
    """Multiply int8 rows by int8 or int4 weights, accumulating in int32 within a group.

    `y[r, o] = Σ_g scale[o, g] Σ_{i in g} x[r, i] code[o, i]`, the inner sum exact for all values of codes, the outer
    one in float32. For more rows than 8, or groups of an odd size, it is a product of floats, which rounds as it sums.

    Args:
        x: int8 `[rows, in]`; its own scale, by token, is applied to the result.
        codes: as the module says.
        scales: float32 `[out, groups]`.
        kind: `"int8"` or `"int4"`.
        group_size: inputs that share a scale.

    Returns:
        float32 `[rows, out]`.

    Raises:
        ValueError: the arrays do not belong together, or the codes are no integers.
    """
    quantized_forms.check(quantized_forms.inputs_of(x), codes, scales, kind, group_size)
    if kind == "nf4" or x.dtype != jnp.int8:
        raise ValueError(f"got {x.dtype} inputs and {kind} weights: expected int8 inputs and int8 or int4 weights")
    if not _is_few(x, kind, group_size):
        return _product(x.astype(jnp.float32), codes, scales, kind, group_size)
    if not serves_quantized_rows(x, codes, scales, kind=kind, group_size=group_size):
        return quantized_forms.integer_rows(x, codes, scales, kind, group_size)

    def native(x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array) -> jax.Array:
        return call_integers(x, codes, scales, place, _all_rows(x), group_size)

    def form(x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array) -> jax.Array:
        return quantized_forms.integer_rows(x, taken(codes, place), taken(scales, place), kind, group_size)

    return jax.lax.platform_dependent(x, *stack_of(codes, scales), cpu=native, default=form)


def dequantized(
    codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int, inputs: int, after: jax.Array | None = None
) -> jax.Array:
    """Return the float32 weights `[out, inputs]`; on a CPU by a kernel, which is bound by writing them.

    Args:
        codes: as the module says.
        scales: float32 `[out, groups]`.
        kind: of the codes.
        group_size: inputs that share a scale.
        inputs: of the weights.
        after: what must be there first, such as the other side of a product. Else a compiled model makes the weights of
            all its layers before it begins, each in memory of its own, and reads them from there.
    """
    form = functools.partial(dequantize, kind=kind, group_size=group_size, inputs=inputs)
    quantized_forms.check(inputs, codes, scales, kind, group_size)
    if not library.is_available() or group_size % 2:
        return form(codes, scales)

    def native(codes: jax.Array, scales: jax.Array, after: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((codes.shape[0], inputs), jnp.float32)
        call = jax.ffi.ffi_call("easydel_dequantize", result, vmap_method="sequential")
        return call(codes, scales, table(kind), after, group_size=np.int64(group_size))

    def default(codes: jax.Array, scales: jax.Array, after: jax.Array) -> jax.Array:
        del after
        return form(codes, scales)

    after = scales if after is None else jax.lax.stop_gradient(after)
    return jax.lax.platform_dependent(codes, scales, after, cpu=native, default=default)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _rows(
    x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array, kind: Kind, group_size: int
) -> jax.Array:
    """Multiply by one of a stack's weights."""
    if not _is_few(x, kind, group_size):
        return _product(x, taken(codes, place), taken(scales, place), kind, group_size)
    one: Any = (jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in (codes, scales))
    if not serves_quantized_rows(x, *one, kind=kind, group_size=group_size):
        return quantized_forms.rows(x, taken(codes, place), taken(scales, place), kind, group_size)

    def native(x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array) -> jax.Array:
        return call_floats(x, codes, scales, place, _all_rows(x), kind, group_size)

    def form(x: jax.Array, codes: jax.Array, scales: jax.Array, place: jax.Array) -> jax.Array:
        return quantized_forms.rows(x, taken(codes, place), taken(scales, place), kind, group_size)

    return jax.lax.platform_dependent(x, codes, scales, place, cpu=native, default=form)


@functools.partial(_rows.defjvp, symbolic_zeros=True)
def _rows_jvp(kind, group_size, primals, tangents):  # type: ignore[no-untyped-def]
    (x, codes, scales, place), (x_dot, _, scales_dot, _) = primals, tangents
    # By the float weights: a derivative by x has as many rows as a batch has tokens.
    moved = jnp.zeros((x.shape[0], codes.shape[1]), jnp.float32)
    if not isinstance(x_dot, SymbolicZero):
        moved = _product(x_dot, taken(codes, place), taken(scales, place), kind, group_size, after=x)
    if not isinstance(scales_dot, SymbolicZero):
        options = {"kind": kind, "group_size": group_size, "inputs": x.shape[1]}
        moved = moved + x @ dequantize(taken(codes, place), taken(scales_dot, place), **options).T
    return _rows(x, codes, scales, place, kind, group_size), moved


def stack_of(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the stacks `[n, out, …]` that codes and scales lie in, and int32, where in them they begin.

    Args:
        codes: of one weight, or of several behind one another, `[…, out, bytes]`.
        scales: of the same.
    """
    of_codes, of_scales, place = slice_of(codes), slice_of(scales), jnp.int32(0)
    if of_codes is not None and of_scales is not None:
        place = of_codes.place * math.prod(codes.shape[:-2])
        codes, scales = of_codes.stack, of_scales.stack
    flat = (part.reshape(math.prod(part.shape[:-2]), *part.shape[-2:]) for part in (codes, scales))
    return *flat, place


def _all_rows(x: jax.Array) -> np.ndarray:
    return np.full(1, x.shape[0], np.int32)


def _is_few(x: jax.Array, kind: Kind, group_size: int) -> bool:
    return x.shape[0] <= MOST_ROWS and group_size % 2 == 0 and x.size > 0


def _product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, kind: Kind, group_size: int, after: jax.Array | None = None
) -> jax.Array:
    after = x if after is None else after
    weights = dequantized(codes, scales, kind=kind, group_size=group_size, inputs=x.shape[1], after=after)
    return jax.lax.dot_general(
        x, weights, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def call_floats(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    place: Any,
    sizes: Any,
    kind: Kind,
    group_size: int,
    widest: bool = True,
) -> jax.Array:
    """Call the kernel, by the widest instructions of the processor or by AVX2.

    Args:
        x: float32 `[rows, in]`.
        codes: of a stack, `[n, out, bytes]`.
        scales: float32 `[n, out, groups]`.
        place: int32, the weight of the first group of rows; that of the next follows it.
        sizes: int32 `[groups of rows]`; rows beyond their sum come out 0.
        kind: of the codes.
        group_size: inputs that share a scale.
        widest: or by AVX2.
    """
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("easydel_quantized_rows", result, vmap_method="sequential")
    where = jnp.asarray(place, jnp.int32).reshape(1)
    return call(x, codes, scales, table(kind), where, sizes, group_size=np.int64(group_size), widest=widest)


def call_integers(
    x: jax.Array, codes: jax.Array, scales: jax.Array, place: Any, sizes: Any, group_size: int, widest: bool = True
) -> jax.Array:
    """Call the kernel for int8 rows; else as `call_floats`."""
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("easydel_integer_rows", result, vmap_method="sequential")
    where = jnp.asarray(place, jnp.int32).reshape(1)
    return call(x, codes, scales, where, sizes, group_size=np.int64(group_size), widest=widest)
