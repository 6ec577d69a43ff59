"""The compiled loop: a prompt into the cache, then token after token without leaving the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.generation.sampling import Sampler
from easydel.structure import Structure


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where a generation stands.

    Attributes:
        memory: what the model needs to go on: a cache, or the sequences so far.
        tokens: int32 `[batch, capacity]`, the new tokens.
        current: int32 `[batch]`, the last of them.
        finished: bool `[batch]`.
        step: int32 `[]`, how many were made.
        keys: random keys `[batch]`.
    """

    memory: Any
    tokens: jax.Array
    current: jax.Array
    finished: jax.Array
    step: jax.Array
    keys: jax.Array


def begin(memory: Any, batch: int, capacity: int, seed: Any) -> Progress:
    """Make the state before the first token."""
    return Progress(
        memory=memory,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        current=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), bool),
        step=jnp.zeros((), jnp.int32),
        keys=jax.random.split(jax.random.key(seed), batch),
    )


def advance(progress: Progress, logits: jax.Array, memory: Any, sampler: Sampler) -> Progress:
    """Choose the next tokens from logits `[batch, vocab]`; rows that have ended get padding."""
    chosen = sampler.choose(logits, progress.keys, progress.step)
    chosen = jnp.where(progress.finished, sampler.pad_token_id, chosen)
    return replace(
        progress,
        memory=memory,
        tokens=jax.lax.dynamic_update_slice(progress.tokens, chosen[:, None], (0, progress.step)),
        current=chosen,
        finished=progress.finished | sampler.is_eos(chosen),
        step=progress.step + 1,
    )


@dataclass(frozen=True)
class CachedLoop:
    """The two programs of a model that takes a cache, for one length and dtype of the cache."""

    graphdef: Any
    max_length: int
    cache_dtype: str | None

    @functools.cached_property
    def prefill(self) -> Any:
        """Compiled `(params, other, ids, mask, context, seed, sampler) -> Progress` with the first token."""
        return jax.jit(self._prefill)

    @functools.cached_property
    def decode(self) -> Any:
        """Compiled `(params, other, progress, sampler, limit) -> Progress`; the progress given is used up."""
        return jax.jit(self._decode, donate_argnums=2)

    def _prefill(
        self,
        params: Any,
        other: Any,
        ids: jax.Array,
        mask: jax.Array,
        context: dict[str, jax.Array],
        seed: jax.Array,
        sampler: Sampler,
    ) -> Progress:
        model = nnx.merge(self.graphdef, params, other)
        batch, width = ids.shape
        cache = model.init_operations_cache(batch, width, dtype=self.cache_dtype)
        # The prompt attends to itself alone: the cache gets its full length afterwards.
        logits, cache = _next_logits(model, ids, mask, cache, **context)
        return advance(begin(None, batch, self.max_length, seed), logits, cache.grow(self.max_length), sampler)

    def _decode(self, params: Any, other: Any, progress: Progress, sampler: Sampler, limit: jax.Array) -> Progress:
        model = nnx.merge(self.graphdef, params, other)

        def body(progress: Progress) -> Progress:
            logits, cache = _next_logits(model, progress.current[:, None], None, progress.memory)
            return advance(progress, logits, cache, sampler)

        return jax.lax.while_loop(lambda p: (p.step < limit) & ~p.finished.all(), body, progress)


def _next_logits(
    model: Any, ids: jax.Array, mask: jax.Array | None, cache: Any, **context: Any
) -> tuple[jax.Array, Any]:
    if hasattr(model, "next_token_logits"):
        return model.next_token_logits(ids, mask, cache, **context)
    out = model(input_ids=ids, attention_mask=mask, cache=cache, **context)
    return out.logits[:, -1], out.cache


@functools.lru_cache(maxsize=32)
def cached_loop(structure: Structure, max_length: int, cache_dtype: str | None = None) -> CachedLoop:
    """Return the programs for a model's structure and `max_length` slots of the cache; equal models share them."""
    return CachedLoop(structure.graphdef, max_length, cache_dtype)
