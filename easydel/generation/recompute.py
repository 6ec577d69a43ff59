"""Generation for models that keep no cache: the whole prefix is run again for each token.

Sequences stand on the left of a buffer whose free columns are padding. That changes nothing for a model that is causal
or honours the attention mask, and whether it does is measured once; for any other each length is run on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.calls import logits_of
from easydel.generation.loop import Progress, advance, begin
from easydel.generation.sampling import Sampler
from easydel.structure import Structure

_ROUNDING = 1e-3
"""Relative difference of logits that is still rounding: a model that sees the padding is far off."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Sequences so far: `ids` int32 `[batch, width]`, tokens on the left, and their `lengths` int32 `[batch]`."""

    ids: Any
    lengths: Any


@dataclass(frozen=True)
class RecomputeLoop:
    """The programs of a model without a cache."""

    graphdef: Any
    takes_mask: bool

    @functools.cached_property
    def next_logits(self) -> Any:
        """Compiled `(params, other, prefix) -> logits [batch, vocab]` of each row's last token."""
        return jax.jit(self._next_logits)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, progress, sampler, limit) -> Progress`; the progress given is used up."""
        return jax.jit(self._decode, donate_argnums=2)

    def _next_logits(self, params: Any, other: Any, prefix: Prefix) -> jax.Array:
        model = nnx.merge(self.graphdef, params, other)
        mask = (jnp.arange(prefix.ids.shape[1]) < prefix.lengths[:, None]).astype(jnp.int32)
        inputs = {"attention_mask": mask} if self.takes_mask else {}
        logits = logits_of(model(input_ids=prefix.ids, **inputs))
        return jnp.take_along_axis(logits, (prefix.lengths - 1)[:, None, None], axis=1)[:, 0]

    def _decode(self, params: Any, other: Any, progress: Progress, sampler: Sampler, limit: jax.Array) -> Progress:
        def body(progress: Progress) -> Progress:
            prefix = progress.memory
            progress = advance(progress, self._next_logits(params, other, prefix), None, sampler)
            rows = jnp.arange(prefix.ids.shape[0])
            ids = prefix.ids.at[rows, prefix.lengths].set(progress.current)
            return replace(progress, memory=Prefix(ids, prefix.lengths + 1))

        return jax.lax.while_loop(lambda p: (p.step < limit) & ~p.finished.all(), body, progress)

    def padding_is_unseen(self, params: Any, other: Any, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether the first row gives the same logits with padding behind it and without."""
        padded = self.next_logits(params, other, Prefix(ids[:1], lengths[:1]))
        exact = self.next_logits(params, other, Prefix(ids[:1, : lengths[0]], lengths[:1]))
        scale = float(jnp.abs(exact).max())
        return bool(jnp.abs(padded - exact).max() <= _ROUNDING * max(scale, 1e-6))

    def run_exactly(
        self, params: Any, other: Any, ids: np.ndarray, length: int, sampler: Sampler, seed: int, limit: int
    ) -> Iterator[Progress]:
        """Yield the progress after each token, every length compiled on its own."""
        sequences = ids[:, :length]
        progress = begin(None, ids.shape[0], limit, np.uint32(seed))
        while int(progress.step) < limit and not bool(progress.finished.all()):
            lengths = np.full(ids.shape[0], sequences.shape[1], np.int32)
            logits = self.next_logits(params, other, Prefix(sequences, lengths))
            progress = advance(progress, logits, None, sampler)
            sequences = np.concatenate([sequences, np.asarray(progress.current)[:, None]], axis=1)
            yield progress


@functools.lru_cache(maxsize=32)
def recompute_loop(structure: Structure, takes_mask: bool) -> RecomputeLoop:
    """Return the programs for a model's structure (see `cached_loop`)."""
    return RecomputeLoop(structure.graphdef, takes_mask)
