"""The compiled loop: a prompt into the cache, then token after token without leaving the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from easydel.generation.search import Progress, Search, advance, begin
from easydel.generation.written import begin_after
from easydel.structure import Structure

NextLogits = Callable[[Progress], tuple[jax.Array, Any]]
"""From where a generation stands to logits `[rows, vocab]` and what the model keeps."""


def run(next_logits: NextLogits, progress: Progress, search: Search, limit: jax.Array) -> Progress:
    """Go on until `limit` tokens are made or every row has ended."""

    def body(progress: Progress) -> Progress:
        return advance(progress, *next_logits(progress), search)

    return jax.lax.while_loop(lambda p: (p.written.step < limit) & ~p.finished.all(), body, progress)


@dataclass(frozen=True)
class CachedLoop:
    """The two programs of a model that takes a cache, for one length and dtype of the cache.

    Attributes:
        graphdef: of the model.
        max_length: slots of the cache.
        cache_dtype: `"int8"`, or `None`: the model's.
        records: steps that scores or logits are recorded for, if they are.
    """

    graphdef: Any
    max_length: int
    cache_dtype: str | None
    records: int

    @functools.cached_property
    def prefill(self) -> Any:
        """Compiled `(params, other, ids, mask, context, seed, search) -> Progress` with the first token."""
        return jax.jit(self._prefill)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, progress, search, limit) -> Progress`; the progress given is used up."""
        return jax.jit(self._decode, donate_argnums=2)

    def _prefill(
        self,
        params: Any,
        other: Any,
        ids: jax.Array,
        mask: jax.Array,
        context: dict[str, jax.Array],
        seed: jax.Array,
        search: Search,
    ) -> Progress:
        model = nnx.merge(self.graphdef, params, other)
        batch, width = ids.shape
        cache = model.init_operations_cache(batch, width, dtype=self.cache_dtype)
        # The prompt attends to itself alone: the cache gets its full length afterwards.
        logits, cache = _next_logits(model, ids, mask, cache, **context)
        written = begin_after(ids, mask, self.max_length, search.pad_token_id)
        return begin(logits, cache.grow(self.max_length), written, seed, search, self.records)

    def _decode(self, params: Any, other: Any, progress: Progress, search: Search, limit: jax.Array) -> Progress:
        model = nnx.merge(self.graphdef, params, other)

        def next_logits(progress: Progress) -> tuple[jax.Array, Any]:
            written = progress.written
            current = jax.lax.dynamic_slice_in_dim(written.tokens, written.length - 1, 1, axis=1)
            return _next_logits(model, current, None, progress.memory)

        return run(next_logits, progress, search, limit)


def _next_logits(
    model: Any, ids: jax.Array, mask: jax.Array | None, cache: Any, **context: Any
) -> tuple[jax.Array, Any]:
    if hasattr(model, "next_token_logits"):
        return model.next_token_logits(ids, mask, cache, **context)
    out = model(input_ids=ids, attention_mask=mask, cache=cache, **context)
    return out.logits[:, -1], out.cache


@functools.lru_cache(maxsize=32)
def cached_loop(structure: Structure, max_length: int, cache_dtype: str | None = None, records: int = 0) -> CachedLoop:
    """Return the programs for a model's structure and `max_length` slots of the cache; equal models share them."""
    return CachedLoop(structure.graphdef, max_length, cache_dtype, records)
