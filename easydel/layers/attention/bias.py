"""Biases that are added to attention's products: by how far apart two slots lie, or by the key's place (ALiBi)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.layers.attention.mask import AttentionMask
from easydel.layers.linear import normal_init


class AttentionBias(Protocol):
    """What attention is given as its bias: a pytree that makes any block of it."""

    def __call__(self, mask: AttentionMask, queries: range, keys: range) -> jax.Array:
        """Return the bias of these queries and keys (places in the arrays).

        It is float32 `[batch, heads, queries, keys]`, 1 in place of the batch or the queries where they do not matter.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BucketBias:
    """A learned number per head and bucket of distances (T5, arXiv:1910.10683, section 2.1).

    Attributes:
        table: `[buckets, heads]`.
        max_distance: slots farther apart share the last bucket (static).
        bidirectional: whether keys after the query have buckets of their own; without, they share bucket 0 (static).
    """

    table: jax.Array
    max_distance: int = field(metadata={"static": True})
    bidirectional: bool = field(metadata={"static": True})

    def __call__(self, mask: AttentionMask, queries: range, keys: range) -> jax.Array:
        """See `AttentionBias`."""
        # All buckets are known beforehand: a place in this row is a distance, from -reach to reach.
        reach = max(self.max_distance, self.table.shape[0])
        row = buckets(np.arange(-reach, reach + 1), self.table.shape[0], self.max_distance, self.bidirectional)
        by_distance = self.table.astype(jnp.float32)[row]
        places = jnp.clip(mask.distances(queries, keys), -reach, reach) + reach
        return jnp.moveaxis(by_distance[places], -1, 0)[None]


def buckets(distances: np.ndarray, count: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Return the bucket of each distance (how many slots a key lies before its query), int32 of the same shape.

    The nearest distances have a bucket each; from half of a side's buckets on, they grow logarithmically.
    """
    first = np.zeros_like(distances)
    if bidirectional:
        count //= 2
        first, distances = np.where(distances < 0, count, 0), np.abs(distances)
    else:
        distances = np.maximum(distances, 0)
    exact = count // 2
    # In float32 and in this order, as models were trained: elsewhere a border could fall on the other side.
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + grown.astype(np.int32), count - 1)
    return (first + np.where(distances < exact, distances, far)).astype(np.int32)


class RelativePositions(nnx.Module):
    """The learned table of a stack's `BucketBias`.

    Args:
        num_buckets: of distances, both directions together; at least 4.
        num_heads: of every attention layer that uses it.
        max_distance: slots farther apart share the last bucket; beyond the distances that have one each.
        bidirectional: whether keys after the query are seen.
        init_stddev: of the initial table.

    Raises:
        ValueError: the buckets do not reach from the near distances to `max_distance`.
    """

    def __init__(
        self,
        num_buckets: int,
        num_heads: int,
        *,
        max_distance: int,
        bidirectional: bool,
        init_stddev: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        exact = num_buckets // 4 if bidirectional else num_buckets // 2
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"relative positions need at least 4 buckets and a max_distance above {exact}, "
                f"got num_buckets={num_buckets} and max_distance={max_distance}"
            )
        self.embedding = nnx.Param(normal_init(init_stddev)(rngs.params(), (num_buckets, num_heads), param_dtype))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def __call__(self) -> BucketBias:
        """Return the bias for `LayerInputs`."""
        return BucketBias(self.embedding.get_value(), self.max_distance, self.bidirectional)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyBias:
    """A number for each head and key, whoever asks.

    Attributes:
        values: float32 `[batch or 1, heads, slots]`, of all slots of the sequence (of a cache, where there is one).
    """

    values: jax.Array

    def __call__(self, mask: AttentionMask, queries: range, keys: range) -> jax.Array:
        """See `AttentionBias`."""
        if mask.key_slots is None:
            return self.values[:, :, None, keys.start : keys.stop]
        slots = jnp.maximum(mask.key_slots[keys.start : keys.stop], 0)  # what is in no slot is not seen
        return jnp.take(self.values, slots, axis=2, mode="clip")[:, :, None]


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slopes of attention with linear biases (arXiv:2108.12409), float32 `[heads]`.

    They are the powers of one number; where `heads` is no power of two, those of the next lower one come first, then
    every other one of the next higher.
    """
    lower = 2 ** (heads.bit_length() - 1)

    def powers(of: int, exponents: np.ndarray) -> np.ndarray:
        return np.float32(2.0 ** (-8.0 / of)) ** exponents.astype(np.float32)

    further = powers(2 * lower, np.arange(1, 1 + 2 * (heads - lower), 2))
    return np.concatenate([powers(lower, np.arange(1, 1 + lower)), further])


def counted(mask: AttentionMask, length: int) -> jax.Array:
    """Return how many tokens stand before each slot, float32 `[batch or 1, slots]`, for biases by the key's place.

    Softmax sees only how they differ within a row, so ALiBi's distances to the query need not be taken; nor do they
    begin anew in a packed row.

    Args:
        mask: over all slots, as it comes before the layers.
        length: how many slots there are if the mask knows none that are padding.
    """
    if mask.key_valid is None:
        return jnp.arange(length, dtype=jnp.float32)[None]
    return jnp.maximum(jnp.cumsum(mask.key_valid, axis=1, dtype=jnp.int32) - 1, 0).astype(jnp.float32)
