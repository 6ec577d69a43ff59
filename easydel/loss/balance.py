"""The losses that keep a mixture of experts balanced, and its routers' logits small."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def load_balancing_loss(
    router_logits: Sequence[jax.Array], top_k: int, attention_mask: jax.Array | None = None
) -> jax.Array:
    """Measure how unevenly tokens are spread over experts (Switch Transformer, arXiv:2101.03961, equations 4-6).

    `experts · Σ_e share_e · probability_e`: the share of tokens that go to an expert times its mean probability, both
    taken over all layers at once. `top_k` if even.

    Args:
        router_logits: of each layer, `[batch, seq, experts]`.
        top_k: how many experts a token goes to.
        attention_mask: 0 where a token is padding, `[batch, ≥ seq]`; its last columns are those of the tokens.

    Returns:
        float32 `[]`; 0 if all is padding.
    """
    logits, counts, count = _stacked(router_logits, attention_mask)
    experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(probabilities, top_k)
    went = jnp.sum(chosen[..., None] == jnp.arange(experts), axis=-2, dtype=jnp.float32)
    share, probability = (jnp.einsum("lbse,bs->e", x, counts) / count for x in (went, probabilities))
    return experts * jnp.sum(share * probability)


def router_z_loss(router_logits: Sequence[jax.Array], attention_mask: jax.Array | None = None) -> jax.Array:
    """Measure how large routers' logits are: the mean of `logsumexp(logits)²` (ST-MoE, arXiv:2202.08906, equation 5).

    The mean is over tokens and, as for `load_balancing_loss`, over all layers at once.

    Args:
        router_logits: of each layer, `[batch, seq, experts]`.
        attention_mask: 0 where a token is padding, `[batch, ≥ seq]`; its last columns are those of the tokens.

    Returns:
        float32 `[]`; 0 if all is padding.
    """
    logits, counts, count = _stacked(router_logits, attention_mask)
    return jnp.einsum("lbs,bs->", jax.nn.logsumexp(logits, axis=-1) ** 2, counts) / count


def _stacked(
    router_logits: Sequence[jax.Array], attention_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `[layers, batch, seq, experts]`, which tokens count `[batch, seq]`, and how many in all layers."""
    logits = jnp.stack(list(router_logits)).astype(jnp.float32)
    counts = jnp.ones(logits.shape[1:-1], jnp.float32)
    if attention_mask is not None:
        counts = jnp.asarray(attention_mask)[:, -logits.shape[2] :].astype(jnp.float32)
    return logits, counts, jnp.maximum(counts.sum() * logits.shape[0], 1)
