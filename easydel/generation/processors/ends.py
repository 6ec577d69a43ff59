"""First and last tokens: held back, forced or made likelier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from easydel.generation.processors.ids import among, ban
from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MinNewTokens:
    """Bans end-of-text tokens until enough tokens are made.

    Attributes:
        least: int32 `[]`, new tokens before one may end the row.
        eos_token_ids: int32 `[n]`, padded with `NO_TOKEN`.
    """

    least: Any
    eos_token_ids: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`, -inf for banned tokens."""
        return ban(among(self.eos_token_ids, scores.shape[1]) & (written.step < self.least), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForcedBos:
    """Forces the token after a prompt of one: `token`, int32 `[]`."""

    token: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`; of rows whose token is forced 0 for it and -inf for others."""
        forced = jnp.where(jnp.arange(scores.shape[1]) == self.token, 0.0, -jnp.inf)
        return jnp.where((written.counts == 1)[:, None], forced, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForcedEos:
    """Forces one of some tokens as the last of `max_new_tokens`.

    Attributes:
        ids: int32 `[n]`, padded with `NO_TOKEN`.
        max_new_tokens: int32 `[]`.
    """

    ids: Any
    max_new_tokens: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]`; at the last step 0 for those tokens and -inf for others."""
        forced = jnp.where(among(self.ids, scores.shape[1]), 0.0, -jnp.inf)
        return jnp.where(written.step == self.max_new_tokens - 1, forced, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExponentialDecay:
    """Adds `|score| · (factor^(step - start) - 1)` to the scores of end-of-text tokens after `start` new tokens.

    Attributes:
        start: int32 `[]`.
        factor: float32 `[]`.
        eos_token_ids: int32 `[n]`, padded with `NO_TOKEN`.
    """

    start: Any
    factor: Any
    eos_token_ids: Any

    def __call__(self, written: Written, scores: jax.Array) -> jax.Array:
        """Return the scores `[rows, vocab]` with the growing bonus."""
        over = jnp.maximum(written.step - self.start, 0)
        grown = scores + jnp.abs(scores) * (jnp.power(self.factor, over.astype(jnp.float32)) - 1)
        changed = among(self.eos_token_ids, scores.shape[1]) & (over > 0) & jnp.isfinite(scores)
        return jnp.where(changed, grown, scores)
