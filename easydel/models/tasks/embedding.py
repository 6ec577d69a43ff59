"""Models that give each sequence one vector."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.models.tasks.base import TaskModule
from easydel.outputs import EmbeddingOutput

POOLINGS = ("mean", "cls", "last")


class Embedding(TaskModule):
    """One vector for each row, of length one if `embedding_normalize`, so that products are cosines.

    The config's `embedding_pooling` says of what: the mean of the tokens (Sentence-BERT, arXiv:1908.10084), the first
    token (`"cls"`) or the last. Padding never counts; a row is one sequence, even if `segment_ids` pack several.
    """

    can_generate: ClassVar[bool] = False

    def _add_head(self, rngs: nnx.Rngs) -> None:
        del rngs
        if self.config.embedding_pooling not in POOLINGS:
            raise UnsupportedError(
                f"embedding_pooling={self.config.embedding_pooling!r} is not supported; "
                f"choose one of {', '.join(POOLINGS)}"
            )

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> EmbeddingOutput:
        """Turn the backbone's output into embeddings `[batch, hidden]`."""
        hidden = out.last_hidden_state
        mask = None if attention_mask is None else jnp.asarray(attention_mask)[:, -hidden.shape[1] :].astype(bool)
        pooled = pool(hidden, mask, self.config.embedding_pooling)
        if self.config.embedding_normalize:
            pooled = normalize(pooled)
        return EmbeddingOutput(
            embeddings=pooled.astype(self.dtype), last_hidden_state=out.last_hidden_state, **out.carried()
        )


def pool(hidden: jax.Array, mask: jax.Array | None, how: str) -> jax.Array:
    """Return one vector for each row, float32 `[batch, hidden]`.

    Args:
        hidden: `[batch, seq, hidden]`.
        mask: bool `[batch, seq]`, which places hold a token; `None`: all. A row without any gives zeros.
        how: `"mean"`, `"cls"` (the first token) or `"last"`.
    """
    batch, length = hidden.shape[:2]
    mask = jnp.ones((batch, length), bool) if mask is None else mask
    if how == "mean":
        weights = mask.astype(jnp.float32)
    else:
        places = jnp.arange(length)
        chosen = jnp.argmax(mask, axis=1) if how == "cls" else jnp.max(jnp.where(mask, places, 0), axis=1)
        weights = ((places == chosen[:, None]) & mask).astype(jnp.float32)
    total = jnp.einsum("bs,bsh->bh", weights, hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)


def normalize(vectors: jax.Array) -> jax.Array:
    """Scale `[..., features]` to length one; a vector of zeros stays as it is, and its gradient finite."""
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # as torch: lengths under 1e-12 count as that
