"""Attention of one query in each row, which reads keys and values where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.native import library

Reference = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def serves_one_query(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether `one_query` is the better way where these are on a CPU."""
    return query.shape[1] == 1 and query.dtype == key.dtype == value.dtype == jnp.float32 and library.is_available()


def one_query(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    reference: Reference,
) -> jax.Array:
    """Compute attention of one query in each row.

    Args:
        query: float32 `[batch, 1, heads, dim]`.
        key: float32 `[batch, slots, kv_heads, dim]`.
        value: float32 `[batch, slots, kv_heads, value_dim]`.
        seen: bool `[batch, slots]`; a row that sees nothing gets zeros.
        scale: factor of the products.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        reference: `(query, key, value, seen)` → the same, elsewhere than on a CPU and for derivatives.

    Returns:
        float32 `[batch, 1, heads, value_dim]`.
    """
    return _one_query(reference, scale, softcap or 0.0, query, key, value, seen)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _one_query(reference: Reference, scale: float, softcap: float, *arrays: jax.Array) -> jax.Array:
    native = functools.partial(_native, scale, softcap)
    return jax.lax.platform_dependent(*arrays, cpu=native, default=reference)


@_one_query.defjvp
def _one_query_jvp(
    reference: Reference, scale: float, softcap: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    del scale, softcap
    *arrays, seen = primals
    return jax.jvp(lambda q, k, v: reference(q, k, v, seen), tuple(arrays), tuple(tangents[:-1]))


def _native(
    scale: float, softcap: float, query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array
) -> jax.Array:
    batch, _, heads, _ = query.shape
    result = jax.ShapeDtypeStruct((batch, heads, value.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("easydel_one_query", result, vmap_method="sequential")
    return call(query[:, 0], key, value, seen, scale=np.float32(scale), softcap=np.float32(softcap))[:, None]
