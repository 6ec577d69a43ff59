"""A few rows times quantized weights on NVIDIA GPUs: a Pallas kernel that decodes in registers.

The bytes that a float product reads bound it; here a program reads the codes of some outputs, decodes a block of them
at a time and adds its products to sums of the same shape, which are summed along the inputs at the end. Lowered by
Triton, which serves all of NVIDIA's generations that jax does.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from easydel import native
from easydel.native import quantized_forms
from easydel.native.codes import Kind
from easydel.native.codes import table as values_of_nibbles

MOST_ROWS = 8
OUTPUTS, BYTES = 4, 256
"""The codes of a block, of powers of two as Triton wants them: for 128 threads, 8 sums a thread for each row."""


def serves_quantized_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int) -> bool:
    """Whether the kernel multiplies `x [rows, in]` by these weights on a GPU: up to 8 rows, groups of an even size."""
    quantized_forms.check(quantized_forms.inputs_of(x), codes, scales, kind, group_size)
    floats = bool(jnp.issubdtype(x.dtype, jnp.floating))
    return floats and 0 < x.shape[0] <= MOST_ROWS and x.size > 0 and codes.size > 0 and group_size % 2 == 0


def quantized_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int) -> jax.Array:
    """Multiply rows by quantized weights as `native.quantized_rows` does; on an NVIDIA GPU, few rows by the kernel.

    Arguments, result, derivatives and errors are those of `native.quantized_rows`, which serves everything else. The
    kernel is considered where jax's default backend is a GPU.
    """
    options: dict[str, Any] = {"kind": kind, "group_size": group_size}
    if jax.default_backend() != "gpu" or not serves_quantized_rows(x, codes, scales, **options):
        return native.quantized_rows(x, codes, scales, **options)
    return _rows(x, codes, scales, kind, group_size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _rows(x: jax.Array, codes: jax.Array, scales: jax.Array, kind: Kind, group_size: int) -> jax.Array:
    kernel = functools.partial(multiply, kind=kind, group_size=group_size)
    elsewhere = functools.partial(native.quantized_rows, kind=kind, group_size=group_size)
    return jax.lax.platform_dependent(x, codes, scales, cuda=kernel, default=elsewhere)


@_rows.defjvp
def _rows_jvp(kind, group_size, primals, tangents):  # type: ignore[no-untyped-def]
    (x, codes, scales), (x_dot, _, scales_dot) = primals, tangents

    def elsewhere(x: jax.Array, scales: jax.Array) -> jax.Array:
        return native.quantized_rows(x, codes, scales, kind=kind, group_size=group_size)

    _, moved = jax.jvp(elsewhere, (x, scales), (x_dot, scales_dot))
    return _rows(x, codes, scales, kind, group_size), moved


def multiply(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, kind: Kind, group_size: int, interpret: bool = False
) -> jax.Array:
    """Call the kernel.

    Args:
        x: floating `[rows, in]`, at most 8 rows.
        codes: int8 `[out, in]` or uint8 `[out, ceil(in / 2)]`, as in `easydel/native/quantized.py`.
        scales: float32 `[out, groups]`.
        kind: `"int8"`, `"int4"` or `"nf4"`.
        group_size: inputs that share a scale, an even number.
        interpret: run it by XLA operation by operation, on any platform.

    Returns:
        `[rows, out]` in x's dtype, accumulated in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    table = jnp.asarray(values_of_nibbles(kind))
    call = pl.pallas_call(
        functools.partial(_kernel, kind=kind, group_size=group_size),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), x.dtype),
        grid=(pl.cdiv(codes.shape[0], OUTPUTS),),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=f"quantized_rows_{kind}",
    )
    return call(x, codes, scales, table)


def _kernel(
    x_ref: Any, codes_ref: Any, scales_ref: Any, table_ref: Any, y_ref: Any, *, kind: Kind, group_size: int
) -> None:
    """Compute `OUTPUTS` columns of all rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, inputs = x_ref.shape
    outputs, width = codes_ref.shape
    each = 1 if kind == "int8" else 2  # codes to a byte
    output = pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS)
    is_output = output < outputs

    def step(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        byte = number * BYTES + jnp.arange(BYTES)
        is_code = is_output[:, None] & (byte < width)[None]
        codes = triton.load(codes_ref.at[output[:, None], byte[None]], mask=is_code, other=0)
        group = byte * each // group_size
        scale = triton.load(scales_ref.at[output[:, None], group[None]], mask=is_code, other=0.0)
        for place in range(each):
            values = _values(codes, place, kind, table_ref) * scale
            position = byte * each + place
            # Beyond the inputs x is 0, so that a nibble that fills the last byte counts for nothing.
            lines = [triton.load(x_ref.at[r, position], mask=position < inputs, other=0.0) for r in range(rows)]
            sums = tuple(sums[r] + values * lines[r].astype(jnp.float32)[None] for r in range(rows))
        return sums

    zero = jnp.zeros((OUTPUTS, BYTES), jnp.float32)
    sums = jax.lax.fori_loop(0, -(-width // BYTES), step, (zero,) * rows)
    for r in range(rows):
        triton.store(y_ref.at[r, output], sums[r].sum(1).astype(y_ref.dtype), mask=is_output)


def _values(codes: jax.Array, place: int, kind: Kind, table_ref: Any) -> jax.Array:
    """Return what codes stand for: float32; of two to a byte, those in `place` 0, the high nibble, or 1."""
    from jax.experimental.pallas import triton

    if kind == "int8":
        return codes.astype(jnp.float32)
    pair = codes.astype(jnp.int32)
    nibble = pair >> 4 if place == 0 else pair & 15
    if kind == "int4":
        return (nibble - ((nibble & 8) << 1)).astype(jnp.float32)
    return triton.load(table_ref.at[nibble])  # of 64 bytes, which stay in the nearest cache
