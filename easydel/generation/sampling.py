"""From logits to tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.options import GenerationOptions

_EOS_SLOTS = 8
"""End-of-text ids are padded to a multiple of this, so that their number hardly ever costs a compilation."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """How a token is chosen. The numbers are traced: changing them compiles nothing anew.

    Attributes:
        temperature: float32 `[]`.
        top_k: int32 `[]`.
        top_p: float32 `[]`.
        eos_token_ids: int32 `[n]`, padded with -1.
        pad_token_id: int32 `[]`.
        min_new_tokens: int32 `[]`.
        do_sample: draw, or take the likeliest (static).
        use_top_k: whether `top_k` applies (static).
        use_top_p: whether `top_p` applies (static).
    """

    temperature: jax.typing.ArrayLike
    top_k: jax.typing.ArrayLike
    top_p: jax.typing.ArrayLike
    eos_token_ids: jax.typing.ArrayLike
    pad_token_id: jax.typing.ArrayLike
    min_new_tokens: jax.typing.ArrayLike
    do_sample: bool = field(metadata={"static": True})
    use_top_k: bool = field(metadata={"static": True})
    use_top_p: bool = field(metadata={"static": True})

    @classmethod
    def create(cls, options: GenerationOptions) -> Self:
        """Make the sampler of some options."""
        count = -(-max(len(options.eos_token_ids), 1) // _EOS_SLOTS) * _EOS_SLOTS
        eos = np.full(count, -1, np.int32)
        eos[: len(options.eos_token_ids)] = options.eos_token_ids
        return cls(
            temperature=np.float32(options.temperature),
            top_k=np.int32(options.top_k or 0),
            top_p=np.float32(1.0 if options.top_p is None else options.top_p),
            eos_token_ids=eos,
            pad_token_id=np.int32(options.pad_token_id),
            min_new_tokens=np.int32(options.min_new_tokens),
            do_sample=options.do_sample,
            use_top_k=options.do_sample and options.top_k is not None,
            use_top_p=options.do_sample and options.top_p is not None and options.top_p < 1,
        )

    def is_eos(self, tokens: jax.Array) -> jax.Array:
        """Return bool, the shape of `tokens`: whether each ends its row."""
        return ((tokens[..., None] == self.eos_token_ids) & (tokens[..., None] >= 0)).any(axis=-1)

    def choose(self, logits: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
        """Choose a token for each row.

        Args:
            logits: `[batch, vocab]`.
            keys: one random key per row, `[batch]`: a row's draws do not depend on its neighbours.
            step: int32 `[]`, the number of tokens chosen before.

        Returns:
            int32 `[batch]`.
        """
        logits = logits.astype(jnp.float32)
        ends = (jnp.arange(logits.shape[-1])[:, None] == self.eos_token_ids).any(axis=-1)
        logits = jnp.where(ends & (step < self.min_new_tokens), -jnp.inf, logits)
        if not self.do_sample:
            return logits.argmax(axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.use_top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.use_top_p:
            logits = keep_top_p(logits, self.top_p)
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        return draw(keys, logits).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: jax.typing.ArrayLike) -> jax.Array:
    """Set all but the `k` largest of `[..., vocab]` to -inf; ties with the k-th stay."""
    vocab = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    threshold = jnp.take_along_axis(
        ascending, jnp.full((*logits.shape[:-1], 1), vocab - jnp.clip(k, 1, vocab)), axis=-1
    )
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Keep the likeliest tokens of `[..., vocab]` up to the one with which their probability reaches `p`."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    keep_ranked = before < p
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
