"""What a state-space layer keeps: its state, and the last tokens that its convolution still reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from easydel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentCache:
    """One state-space layer's cache; its size does not depend on how long the sequence gets.

    Attributes:
        window: `[batch, conv_kernel - 1, channels]`, the convolution's inputs of the last tokens, padding left out;
            zeros before the first.
        state: float32 `[batch, heads, head_dim, state_size]`.
    """

    keeps_slots: ClassVar[bool] = False

    window: jax.Array
    state: jax.Array

    @classmethod
    def create(
        cls, batch_size: int, conv_kernel: int, channels: int, state_shape: tuple[int, int, int], dtype: Any
    ) -> Self:
        """Make the cache before the first token.

        Args:
            batch_size: number of rows.
            conv_kernel: tokens that the convolution reaches.
            channels: of its inputs.
            state_shape: heads, head_dim and state_size.
            dtype: of the window; int8, which is for keys and values, leaves it float32.
        """
        kept = jnp.float32 if jnp.dtype(dtype) == jnp.int8 else dtype
        window = jnp.zeros((batch_size, conv_kernel - 1, channels), kept)
        return cls(window, _constrained(jnp.zeros((batch_size, *state_shape), jnp.float32)))

    def advance(self, inputs: jax.Array, count: jax.Array | None, state: jax.Array) -> Self:
        """Return the cache after new tokens.

        Args:
            inputs: what the convolution was given, `[batch, seq, channels]`, the tokens before all padding.
            count: int32 `[batch]`, how many of them are tokens; `None`: all.
            state: after the last of the tokens.
        """
        kept = self.window.shape[1]
        seen = jnp.concatenate([self.window, inputs.astype(self.window.dtype)], axis=1)
        if count is None:
            window = seen[:, seen.shape[1] - kept :]
        else:
            window = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, kept))(seen, count)
        return type(self)(window, _constrained(state))

    def grow(self, max_length: int) -> Self:
        """Return the cache itself: it has room for any number of positions."""
        del max_length
        return self

    def crop(self, length: int, index: int) -> Self:
        """Return the cache itself where nothing is cut off.

        Raises:
            ValueError: something would be: a state cannot be taken back.
        """
        if length < index:
            raise ValueError(
                f"a recurrent layer's cache cannot be cropped from {index} slots to {length}: its state holds all "
                "tokens at once; keep the cache of the shorter prefix (caches are not changed by later calls)"
            )
        return self

    def shift(self, by: Any) -> Self:
        """Return the cache itself: its state has no slots."""
        del by
        return self


def _constrained(state: jax.Array) -> jax.Array:
    return constrain(state, "batch", "heads", None, None)
