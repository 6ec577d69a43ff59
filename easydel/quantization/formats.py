"""Number formats of quantized weights: from floats to integer codes and scales, and back.

A weight of `in → out` features is stored as torch has it, `[out, in]`, so that a row is what one output needs. Each row
is cut into groups of `group_size` inputs (the last one is shorter where they do not divide), and each group has one
float32 scale:

| format | codes | value of a code `c` | largest error in a group of largest magnitude `m` |
|---|---|---|---|
| `nf4` | uint8 `[out, ceil(in / 2)]`, two a byte | `NF4[c] · s`, `s = m` | `0.152 · m` |
| `int8` | int8 `[out, in]` | `c · s`, `s = m / 127`, `|c| ≤ 127` | `m / 254` |
| `int4` | uint8 `[out, ceil(in / 2)]`, two a byte | `c · s`, `s = m / 7`, `|c| ≤ 7` | `m / 14` |

(up to rounding in float32). Of two codes in a byte the one of the even input is in the high nibble, as bitsandbytes has
it; an odd number of inputs leaves a last nibble over, which holds the code of 0. The codes of `int4` are two's
complement. A group of zeros has scale 0. Everything works along the last two axes, whatever stands before them. The way
back is in `easydel.native.codes`, beside the kernels that take it too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.native.codes import NF4_VALUES, dequantize, grouped, is_packed, spread_scales

NF4 = np.array(NF4_VALUES, np.float32)
"""The 16 points of 4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E)."""

_BORDERS = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)

FORMATS = ("nf4", "int8", "int4")
LARGEST = {"int8": 127, "int4": 7}
ZERO_CODE = {"nf4": 7, "int4": 0}


def group_count(in_features: int, group_size: int) -> int:
    """Return how many groups a row has."""
    return -(-in_features // group_size)


def code_shape(out_features: int, in_features: int, format: str) -> tuple[int, int]:
    """Return the shape of a weight's codes."""
    return out_features, -(-in_features // 2) if is_packed(format) else in_features


def code_dtype(format: str) -> Any:
    """Return the dtype of a format's codes."""
    return jnp.uint8 if is_packed(format) else jnp.int8


def quantize(weight: jax.Array, format: str, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Turn a weight into codes and scales; jit-able.

    Codes of `nf4` are the nearest points of `x / s`; halfway (in float32) it is the lower one, as in bitsandbytes.
    Those of integers are rounded, halfway to the even one.

    Args:
        weight: floating point `[..., out, in]`.
        format: one of `FORMATS`.
        group_size: inputs that share a scale.

    Returns:
        `codes` as in the table above, and `scales`, float32 `[..., out, groups]`.
    """
    x = weight.astype(jnp.float32)
    in_features = x.shape[-1]
    largest = jnp.max(jnp.abs(grouped(x, min(group_size, in_features))), axis=-1)
    scales = largest if format == "nf4" else largest / LARGEST[format]
    each = spread_scales(scales, in_features, group_size)
    x = jnp.where(each > 0, x / jnp.where(each > 0, each, 1), 0)
    if format == "nf4":
        # A sum of comparisons fuses into one pass; a search or a table of distances would not.
        codes = sum(((x > border).astype(jnp.uint8) for border in _BORDERS), jnp.zeros(x.shape, jnp.uint8))
    else:
        codes = jnp.clip(jnp.round(x), -LARGEST[format], LARGEST[format]).astype(jnp.int8)
    return (pack(codes, format) if is_packed(format) else codes), scales


def pack(codes: jax.Array, format: str) -> jax.Array:
    """Put two codes into each byte, `[..., in]` → uint8 `[..., ceil(in / 2)]`."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)], constant_values=ZERO_CODE[format])
    pairs = (codes.astype(jnp.uint8) & 15).reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


@functools.partial(jax.jit, static_argnames=("format", "group_size"))
def quantize_kernel(kernel: jax.Array, format: str, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Quantize a kernel as our layers have it, `[..., in, out]`; one compiled program for all of a shape."""
    return quantize(jnp.swapaxes(kernel, -1, -2), format, group_size)


@functools.partial(jax.jit, static_argnames=("format", "group_size", "in_features", "dtype"))
def dequantize_kernel(
    codes: jax.Array, scales: jax.Array, *, format: str, group_size: int, in_features: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Return the kernel as our layers have it, `[..., in, out]`."""
    options: dict[str, Any] = {"kind": format, "group_size": group_size, "inputs": in_features}
    return jnp.swapaxes(dequantize(codes, scales, dtype=dtype, **options), -1, -2)
