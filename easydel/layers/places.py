"""Where the tokens stand among padding, for layers that go from token to token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Places:
    """Brings the tokens of each row to its front, and results back to where the tokens stood.

    Attributes:
        order: int32 `[batch, seq]`, the place of each gathered token, those of padding last; `None`: nothing is moved.
        back: int32 `[batch, seq]`, its inverse.
        kept: bool `[batch, seq]`, which gathered places hold tokens; `None`: all.
        segments: int32 `[batch, seq]` of the gathered tokens, counted from 0 in each row; `None`: all are of one.
    """

    order: jax.Array | None
    back: jax.Array | None
    kept: jax.Array | None
    segments: jax.Array | None

    @classmethod
    def of(cls, tokens: jax.Array | None, segment_ids: jax.Array | None) -> Places:
        """Make it from which places hold tokens (bool `[batch, seq]` or `None`) and ids of segments (likewise int)."""
        if tokens is not None and tokens.shape[1] > 1:
            order = jnp.argsort(~tokens, axis=1, stable=True)
            places = cls(order, jnp.argsort(order, axis=1), None, None)
        else:
            places = cls(None, None, None, None)
        kept = None if tokens is None else places.gather(tokens)
        if segment_ids is None:
            return replace(places, kept=kept)
        ids = places.gather(segment_ids)
        borders = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        return replace(places, kept=kept, segments=jnp.cumsum(borders, axis=1, dtype=jnp.int32))

    @property
    def count(self) -> jax.Array | None:
        """How many tokens each row has, int32 `[batch]`; `None`: all are."""
        return None if self.kept is None else jnp.sum(self.kept, axis=1, dtype=jnp.int32)

    def gather(self, x: jax.Array) -> jax.Array:
        """Bring the tokens of `[batch, seq, …]` to the front."""
        return x if self.order is None else _permuted(x, self.order, self.back)

    def scatter(self, x: jax.Array) -> jax.Array:
        """Bring gathered `[batch, seq, …]` back to their places."""
        return x if self.order is None else _permuted(x, self.back, self.order)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Reorder `[batch, seq, …]` along the sequence; its gradient gathers too, where autodiff would scatter."""
    del inverse
    return jax.vmap(lambda row, places: row[places])(x, order)


def _permuted_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple]:
    return _permuted(x, order, inverse), (order, inverse)


def _permuted_backward(orders: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    order, inverse = orders
    return _permuted(gradient, inverse, order), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
