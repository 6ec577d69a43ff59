"""The loss that keeps a mixture of experts balanced."""

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
        float32 `[]`.
    """
    logits = jnp.stack(list(router_logits)).astype(jnp.float32)  # [layers, batch, seq, experts]
    experts = logits.shape[-1]
    counts = jnp.ones(logits.shape[1:-1], jnp.float32)
    if attention_mask is not None:
        counts = jnp.asarray(attention_mask)[:, -logits.shape[2] :].astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(probabilities, top_k)
    went = jnp.sum(chosen[..., None] == jnp.arange(experts), axis=-2, dtype=jnp.float32)
    total = counts.sum() * logits.shape[0]
    share, probability = (jnp.einsum("lbse,bs->e", x, counts) / total for x in (went, probabilities))
    return experts * jnp.sum(share * probability)
