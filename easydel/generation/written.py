"""What has been written so far: the tokens that processors and stopping criteria look back at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

NO_TOKEN = -1
"""Stands where there is no token: before a row's first one, and in sets of ids that are padded to a common size."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """Prompts and what was added to them, in a buffer whose size does not change.

    Attributes:
        tokens: int32 `[rows, capacity]`; a row's tokens are the columns from `first[row]` up to `length`.
        first: int32 `[rows]`, columns before it are left padding.
        length: int32 `[]`, columns written.
        step: int32 `[]`, how many of them are new.
    """

    tokens: Any
    first: Any
    length: Any
    step: Any

    @property
    def counts(self) -> jax.Array:
        """How many tokens each row has, int32 `[rows]`."""
        return self.length - self.first

    @property
    def is_token(self) -> jax.Array:
        """Bool `[rows, capacity]`: which columns hold one of the row's tokens."""
        columns = jnp.arange(self.tokens.shape[1])
        return (columns >= self.first[:, None]) & (columns < self.length)

    @property
    def is_new(self) -> jax.Array:
        """Bool `[rows, capacity]`: which columns were added to the prompt."""
        columns = jnp.arange(self.tokens.shape[1])
        new = (columns >= self.length - self.step) & (columns < self.length)
        return jnp.broadcast_to(new, self.tokens.shape)

    def last(self, count: int) -> jax.Array:
        """Return the last `count` tokens of each row, int32 `[rows, count]`, `NO_TOKEN` where it has fewer."""
        columns = self.length - count + jnp.arange(count)
        found = self.tokens.take(jnp.clip(columns, 0, self.tokens.shape[1] - 1), axis=1)
        return jnp.where(columns >= self.first[:, None], found, NO_TOKEN)

    def append(self, tokens: jax.Array) -> Written:
        """Return what is written after one more token for each row, int32 `[rows]`."""
        longer = jax.lax.dynamic_update_slice(self.tokens, tokens[:, None], (0, self.length))
        return replace(self, tokens=longer, length=self.length + 1, step=self.step + 1)

    def reorder(self, rows: jax.Array) -> Written:
        """Return the rows named, int32 `[new rows]`, in that order; one may be named several times."""
        return replace(self, tokens=self.tokens[rows], first=self.first[rows])


def begin_after(ids: Any, mask: Any, capacity: int, pad_token_id: Any) -> Written:
    """Return prompts with nothing added yet.

    Args:
        ids: int32 `[rows, width]`.
        mask: bool `[rows, width]`, false on the left where one is padding.
        capacity: columns in all.
        pad_token_id: int32 `[]`, what the free columns hold.
    """
    rows, width = ids.shape
    free = jnp.full((rows, capacity - width), pad_token_id, jnp.int32)
    return Written(
        tokens=jnp.concatenate([jnp.where(mask, ids, pad_token_id), free], axis=1),
        first=width - mask.sum(axis=1, dtype=jnp.int32),
        length=jnp.full((), width, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
