"""Generation for models that keep no cache: the whole prefix is run again for each token.

Sequences stand on the left of a buffer whose free columns are padding. That changes nothing for a model that is causal
or honours the attention mask, and whether it does is measured once; for any other each length is run on its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.calls import logits_of
from easydel.distributed import whole
from easydel.generation.loop import run
from easydel.generation.search import Progress, Search, advance, begin
from easydel.generation.written import Written
from easydel.structure import Structure

_ROUNDING = 1e-3
"""Relative difference of logits that is still rounding: a model that sees the padding is far off."""


@dataclass(frozen=True)
class RecomputeLoop:
    """The programs of a model without a cache.

    Attributes:
        graphdef: of the model.
        takes_mask: whether it takes an `attention_mask`.
        records: steps that scores or logits are recorded for, if they are.
    """

    graphdef: Any
    takes_mask: bool
    records: int

    @functools.cached_property
    def next_logits(self) -> Any:
        """Compiled `(params, other, ids, lengths) -> logits [rows, vocab]` of each row's last token.

        `ids` are int32 `[rows, width]`, tokens on the left, and `lengths` int32 `[rows]`.
        """
        return jax.jit(self._next_logits)

    @functools.cached_property
    def prefill(self) -> Any:
        """Compiled `(params, other, written, seed, search) -> Progress` with the first token."""
        return jax.jit(self._prefill)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, progress, search, limit) -> Progress`; the progress given is used up."""
        return jax.jit(self._decode, donate_argnums=2)

    def _next_logits(self, params: Any, other: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        model = nnx.merge(self.graphdef, params, other)
        mask = (jnp.arange(ids.shape[1]) < lengths[:, None]).astype(jnp.int32)
        inputs = {"attention_mask": mask} if self.takes_mask else {}
        logits = logits_of(model(input_ids=ids, **inputs))
        return jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def _logits_after(self, params: Any, other: Any, written: Written) -> jax.Array:
        columns = written.first[:, None] + jnp.arange(written.tokens.shape[1])
        ids = jnp.take_along_axis(written.tokens, jnp.minimum(columns, written.tokens.shape[1] - 1), axis=1)
        return self._next_logits(params, other, ids, written.counts)

    def _prefill(self, params: Any, other: Any, written: Written, seed: jax.Array, search: Search) -> Progress:
        live = jnp.ones(written.tokens.shape[0], bool)
        return begin(self._logits_after(params, other, written), None, written, live, seed, search, self.records)

    def _decode(self, params: Any, other: Any, progress: Progress, search: Search, limit: jax.Array) -> Progress:
        def next_logits(progress: Progress) -> tuple[jax.Array, Any]:
            return self._logits_after(params, other, progress.written), None

        return run(next_logits, progress, search, limit)

    def padding_is_unseen(self, params: Any, other: Any, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether the first row gives the same logits with padding behind it and without."""
        padded = self.next_logits(params, other, ids[:1], lengths[:1])
        exact = self.next_logits(params, other, ids[:1, : lengths[0]], lengths[:1])
        scale = float(jnp.abs(exact).max())
        return bool(jnp.abs(padded - exact).max() <= _ROUNDING * max(scale, 1e-6))

    def go_exactly(
        self, params: Any, other: Any, written: Written, progress: Progress | None, seed: np.uint32, search: Search
    ) -> Progress:
        """Return the progress after one more token, for prompts of one length; every length is compiled on its own.

        Args:
            params: of the model.
            other: of the model.
            written: the prompts.
            progress: so far; `None`: nothing was made yet.
            seed: of the draws.
            search: how to choose.
        """
        now = written if progress is None else progress.written
        ids = whole(now.tokens)[:, int(written.first[0]) : int(now.length)]
        logits = self.next_logits(params, other, ids, np.full(len(ids), ids.shape[1], np.int32))
        if progress is None:
            live = np.ones(len(ids), bool)
            return _begin(logits, None, written, live, seed, search, self.records)
        return _advance(progress, logits, None, search)


_begin = jax.jit(begin, static_argnums=6)
_advance = jax.jit(advance)


@functools.lru_cache(maxsize=32)
def recompute_loop(structure: Structure, takes_mask: bool, records: int = 0) -> RecomputeLoop:
    """Return the programs for a model's structure (see `cached_loop`)."""
    return RecomputeLoop(structure.graphdef, takes_mask, records)
