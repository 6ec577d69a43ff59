"""Token embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import native
from easydel.layers.linear import kernels_heed
from easydel.sharding import at_use, is_on_one_device

FEW_ROWS = 32
"""Up to so many rows go through a tied head as its right side: XLA on CPUs takes a table first, half the time."""


class Embed(nnx.Embed):
    """`nnx.Embed` (table `[vocab, features]`) whose table is split over its vocabulary only while it is looked up.

    A table that is split over features as well would have its lookup answered by an all-to-all. One of few rows
    (positions, types) is whole while it is looked up: no device then waits for another's rows.

    Args:
        num_embeddings: size of the vocabulary.
        features: size of a vector.
        precision: of the products with a tied head.
        rows: role of the rows in a mesh while they are used (`easydel.sharding.at_use`); `None`: they are not split.
        padding_idx: the id whose vector learns nothing from being looked up (as in torch; a tied head still trains it).
        **options: as in `nnx.Embed`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        precision: Any = None,
        rows: str | None = "vocab",
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, features, **options)
        self.precision, self.rows, self.padding_idx = precision, rows, padding_idx

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map token ids `[...]` to vectors `[..., features]`; an id outside the vocabulary gives NaN."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"token ids must be integers, got {inputs.dtype}")
        table = at_use(self.embedding.get_value(), inputs, self.rows, None)
        # A negative id would count from the end of the table.
        ids = jnp.where(inputs < 0, self.num_embeddings, inputs)
        vectors = jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)
        if self.padding_idx is None:
            return vectors
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(vectors), vectors)

    def attend(self, query: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map `[..., features]` to logits `[..., vocab]`, for heads tied to the embedding."""
        table = at_use(self.embedding.get_value().astype(self.dtype), query, self.rows, None)
        query = query.astype(self.dtype)
        if is_on_one_device() and query.size <= FEW_ROWS * query.shape[-1]:
            rows = query.reshape(-1, query.shape[-1])
            if kernels_heed(self.precision) and native.serves_few_dots(rows, table):
                return native.few_dots(rows, table).reshape(*query.shape[:-1], -1)
            logits = jnp.einsum("vh,rh->vr", table, rows, precision=self.precision).T
            return logits.reshape(*query.shape[:-1], -1)
        return jnp.einsum("...h,vh->...v", query, table, precision=self.precision)
