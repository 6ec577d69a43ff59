"""Products with quantized weights by XLA alone: what the kernels of `quantized.py` compute, everywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.native.codes import KINDS, Kind, grouped, is_packed, nibble_values

BLOCKS = (8, 9, 7, 10, 6, 11, 12, 5, 4)
"""How many groups XLA's CPU backend adds up in one vectorised piece; a loop over more it leaves one number at a time,
which took five times as long (4096 × 4096)."""


def inputs_of(x: jax.Array) -> int:
    """Return the width of `x [rows, in]`; raise ValueError if it has another number of dimensions."""
    if x.ndim != 2:
        raise ValueError(f"got x {x.shape}: expected [rows, in]")
    return x.shape[1]


def check(inputs: int, codes: Any, scales: Any, kind: Kind, group_size: int) -> None:
    """Raise ValueError unless codes and scales belong together and are those of so many inputs."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: the kinds of quantized weights are {', '.join(KINDS)}")
    if group_size < 1:
        raise ValueError(f"group_size={group_size}: a group has at least one input")
    if codes.ndim != 2:
        raise ValueError(f"got codes {codes.shape}: expected [out, in] for int8, [out, in / 2] for two codes to a byte")
    width = -(-inputs // 2) if is_packed(kind) else inputs
    want = ((codes.shape[0], width), jnp.uint8 if is_packed(kind) else jnp.int8)
    if (codes.shape, codes.dtype) != want:
        raise ValueError(
            f"{kind} codes for {inputs} inputs: got {codes.dtype} {codes.shape}, expected "
            f"{jnp.dtype(want[1])} {want[0]}; 4-bit codes lie two to a byte"
        )
    groups = (codes.shape[0], -(-inputs // group_size))
    if scales.shape != groups or scales.dtype != jnp.float32:
        raise ValueError(
            f"scales for {inputs} inputs in groups of {group_size}: got {scales.dtype} {scales.shape}, expected "
            f"float32 {groups}"
        )


def rows(x: jax.Array, codes: jax.Array, scales: jax.Array, kind: Kind, group_size: int) -> jax.Array:
    """Multiply float32 `x [rows, in]` by quantized weights without making them whole; groups have an even size.

    Returns:
        float32 `[rows, out]`.
    """
    block = next((size for size in BLOCKS if scales.shape[1] % size == 0), scales.shape[1])

    def cut(part: jax.Array) -> jax.Array:
        return part.reshape(*part.shape[:2], -1, block, part.shape[-1])

    def multiply(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        left, right = _halves(x, codes, kind, group_size)
        scales = cut(scales[None, :, :, None])
        # Scaled before they are summed, along the groups: what runs fastest in memory stays, and so vectorises.
        one, two = (cut(part[0]) * cut(part[1].astype(jnp.float32)) * scales for part in (left, right))
        return _sum_both(one, two, 3).sum((-1, -2))

    return _in_halves(multiply, x, codes, scales)


def integer_rows(x: jax.Array, codes: jax.Array, scales: jax.Array, kind: Kind, group_size: int) -> jax.Array:
    """Multiply int8 `x [rows, in]` by quantized weights: int32 within a group, then scaled; groups have an even size.

    Returns:
        float32 `[rows, out]`.
    """

    def multiply(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        left, right = _halves(x.astype(jnp.int32), codes, kind, group_size)
        sums = _sum_both(left[0] * left[1].astype(jnp.int32), right[0] * right[1].astype(jnp.int32), 3)
        return (sums.astype(jnp.float32) * scales[None]).sum(-1)

    return _in_halves(multiply, x, codes, scales)


def _in_halves(multiply: Any, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiply by one half of the outputs after the other, `[rows, out]`.

    A loop keeps XLA's CPU backend from computing each number of `x` anew for each output, with all that leads to it.
    The barrier keeps it from making floats of all codes before a loop over tokens, which each token would then read.
    """
    x, codes = jax.lax.optimization_barrier((x, codes))
    outputs = codes.shape[0]
    if outputs % 2:
        return multiply(x, codes, scales)
    halves = tuple(part.reshape(2, outputs // 2, -1) for part in (codes, scales))
    out = jax.lax.map(lambda half: multiply(x, *half), halves)  # [2, rows, out / 2]
    return out.swapaxes(0, 1).reshape(x.shape[0], outputs)


def _halves(
    x: jax.Array, codes: jax.Array, kind: Kind, group_size: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return x `[rows, 1, groups, half]` and values of codes `[1, out, groups, half]` of both halves of all groups."""
    x = grouped(x, group_size)[:, None]
    if kind == "int8":
        codes, half = grouped(codes, group_size)[None], group_size // 2
        return (x[..., :half], codes[..., :half]), (x[..., half:], codes[..., half:])
    codes = grouped(codes, group_size // 2)[None]
    return (x[..., ::2], nibble_values(codes >> 4, kind)), (x[..., 1::2], nibble_values(codes & 15, kind))


def _sum_both(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Return the sum of two arrays along an axis.

    As one reduction of a pair: on CPUs XLA 0.10.2 hands the plain reduction of a product of converted integers to a
    library that is up to ten times slower than its own loops.
    """
    zero = np.zeros((), left.dtype)
    one, two = jax.lax.reduce((left, right), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (axis,))
    return one + two
