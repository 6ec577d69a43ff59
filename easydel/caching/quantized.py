"""Keys and values as int8 codes, with one scale for each head of each position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from easydel.sharding import constrain

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedStates:
    """Numbers `[…, head_dim]` as `codes · scales`, symmetric: an error is at most `largest / 254` of its head's.

    Attributes:
        codes: int8 `[…, head_dim]`, in [-127, 127].
        scales: float32 `[…, 1]`, the largest magnitude over 127.
    """

    codes: jax.Array
    scales: jax.Array

    @classmethod
    def of(cls, states: jax.Array) -> Self:
        """Quantize `[…, head_dim]`; a head that holds an infinity or NaN gives NaN."""
        states = states.astype(jnp.float32)
        scales = jnp.abs(states).max(axis=-1, keepdims=True) / _LARGEST
        codes = jnp.round(states / jnp.where(scales == 0, 1, scales))
        return cls(codes.astype(jnp.int8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is stood for."""
        return self.codes.shape

    def read(self, dtype: Any) -> jax.Array:
        """Return the numbers that the codes stand for."""
        return (self.codes.astype(jnp.float32) * self.scales).astype(dtype)


States = jax.Array | QuantizedStates
"""Keys or values `[batch, slots, kv_heads, head_dim]` as a cache keeps them."""


def read(states: States, dtype: Any) -> jax.Array:
    """Return them as numbers to compute with."""
    return states.read(dtype) if isinstance(states, QuantizedStates) else states.astype(dtype)


def quantized(states: jax.Array) -> QuantizedStates:
    """Return them as int8."""
    return by_heads(QuantizedStates.of(states))


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return keys or values before the first; of `dtype` int8, `QuantizedStates`."""
    if jnp.dtype(dtype) == jnp.int8:
        zeros = QuantizedStates(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return by_heads(zeros)
    return by_heads(jnp.zeros(shape, dtype))


def updated(states: States, new: jax.Array, write: Callable[[jax.Array, jax.Array], jax.Array]) -> States:
    """Write new numbers, `[batch, new slots, kv_heads, head_dim]`, in the form of the old; `write(old, new)` places."""
    form = QuantizedStates.of(new) if isinstance(states, QuantizedStates) else new.astype(states.dtype)
    return by_heads(jax.tree.map(write, states, form))


def padded(states: States, slots: int) -> States:
    """Return them with empty places up to `slots`."""
    more = ((0, 0), (0, slots - states.shape[1]), (0, 0), (0, 0))
    return by_heads(jax.tree.map(lambda x: jnp.pad(x, more), states))


def rolled(states: States, by: Any) -> States:
    """Return them `by` places further along the slots, int32 `[]`; what leaves at one end comes in at the other."""
    return by_heads(jax.tree.map(lambda x: jnp.roll(x, by, axis=1), states))


def by_heads(states: States) -> Any:
    """Ask for keys or values, and their scales, to be split by rows and heads."""
    return jax.tree.map(lambda x: constrain(x, "batch", None, "heads", None), states)
