"""Tokens to rows sorted by expert, and back: permutations whose gradients are permutations, too.

A row is one (token, chosen expert) pair, so that no token is ever dropped: there are `tokens · top_k` of them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax.struct import dataclass


@dataclass
class Order:
    """Where rows come from and stand.

    Attributes:
        source: int32 `[rows]`, which (token, choice) pair, `token · top_k + choice`, each row is.
        place: int32 `[rows]`, the row of each pair.
        sizes: int32 `[experts]`, how many rows each expert has; rows beyond their sum belong to other devices' experts.
    """

    source: jax.Array
    place: jax.Array
    sizes: jax.Array


def sort_by_expert(experts: jax.Array, num_experts: int) -> Order:
    """Sort the pairs of `experts` `[tokens, top_k]` by expert; those not in `[0, num_experts)` go to the end."""
    wanted = experts.reshape(-1)
    wanted = jnp.where((wanted >= 0) & (wanted < num_experts), wanted, num_experts)
    source = jnp.argsort(wanted, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(source).at[source].set(jnp.arange(source.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(wanted[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Order(source, place, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(tokens: jax.Array, order: Order, top_k: int) -> jax.Array:
    """Copy tokens `[tokens, hidden]` to their rows `[rows, hidden]`."""
    return tokens[order.source // top_k]


def _spread_back(top_k: int, order: Order, rows: jax.Array) -> tuple[jax.Array, None]:
    # A gather and a sum, where autodiff would scatter.
    return sum_choices(rows[order.place].reshape(-1, top_k, rows.shape[-1])), None


spread.defvjp(lambda tokens, order, top_k: (spread(tokens, order, top_k), order), _spread_back)


@jax.custom_vjp
def gather_back(rows: jax.Array, order: Order) -> jax.Array:
    """Return the rows `[rows, hidden]` by pair, `[tokens · top_k, hidden]`."""
    return rows[order.place]


def _gather_back_back(order: Order, pairs: jax.Array) -> tuple[jax.Array, None]:
    return pairs[order.source], None


gather_back.defvjp(lambda rows, order: (gather_back(rows, order), order), _gather_back_back)


def sum_choices(pairs: jax.Array) -> jax.Array:
    """Sum `[tokens, top_k, hidden]` over the choices, one by one: on CPU a tenth of the time of XLA's reduction."""
    total = pairs[:, 0]
    for choice in range(1, pairs.shape[1]):
        total = total + pairs[:, choice]
    return total


def is_local(order: Order) -> jax.Array:
    """Whether a pair's expert is one of the `num_experts` sorted by, bool `[rows]`."""
    return order.place < order.sizes.sum()
