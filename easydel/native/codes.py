"""What the codes of quantized weights stand for: the one place that turns them into floats with XLA.

A weight of `in → out` features is stored as torch has it, `[out, in]`: int8 codes as they are, 4-bit codes two to a
byte, that of the even input in the high nibble. Everything works along the last two axes, whatever stands before them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["int8", "int4", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code points of 4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E)."""

INT4_VALUES = (*range(8), *range(-8, 0))
"""What the 16 nibbles stand for in two's complement."""


def is_packed(kind: str) -> bool:
    """Whether two codes lie in a byte."""
    return kind != "int8"


def table(kind: str) -> np.ndarray:
    """Return the float32 values `[16]` of a kind's 4-bit codes; int8 codes stand for themselves and look at none."""
    return np.asarray(NF4_VALUES if kind == "nf4" else INT4_VALUES, np.float32)


def nibble_values(nibbles: jax.Array, kind: str) -> jax.Array:
    """Return what 4-bit codes, one a byte, stand for: float32 of the same shape."""
    if kind == "int4":
        values = nibbles.astype(jnp.float32)
        return jnp.where(nibbles < 8, values, values - 16)
    return jnp.asarray(table(kind))[nibbles]


def unpack(codes: jax.Array, kind: str, inputs: int) -> jax.Array:
    """Take two codes out of each byte, `[..., ceil(in / 2)]` → uint8 (`nf4`) or int8 (`int4`) `[..., in]`."""
    both = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)[..., :inputs]
    if kind == "nf4":
        return both
    signed = jax.lax.bitcast_convert_type(both, jnp.int8)
    return jnp.where(signed > 7, signed - 16, signed).astype(jnp.int8)


def grouped(x: jax.Array, group_size: int) -> jax.Array:
    """Cut the last axis into groups, `[..., groups, group_size]`, the last one filled up with zeros."""
    if missing := -x.shape[-1] % group_size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, group_size)


def spread_scales(scales: jax.Array, inputs: int, group_size: int) -> jax.Array:
    """Return each input's scale, `[..., groups]` → `[..., in]`."""
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, min(group_size, inputs)))
    return each.reshape(*scales.shape[:-1], -1)[..., :inputs]


def dequantize(
    codes: jax.Array, scales: jax.Array, *, kind: str, group_size: int, inputs: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Return the weights `[..., out, inputs]`: each code's value times its group's scale, in float32, then `dtype`."""
    if kind == "nf4":
        values = nibble_values(unpack(codes, kind, inputs), kind)
    else:
        values = (unpack(codes, kind, inputs) if is_packed(kind) else codes).astype(jnp.float32)
    return (values * spread_scales(scales, inputs, group_size)).astype(dtype)
