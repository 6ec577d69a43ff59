"""Ways to compute `softmax(q·k·scale + bias) · v`; all give the same numbers.

Shapes: query `[batch, queries, heads, dim]`, key and value `[batch, keys, kv_heads, dim]`; `heads` is a multiple
of `kv_heads` (grouped-query attention, arXiv:2305.13245). Values, and with them results, may have another `dim`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from easydel.errors import UnsupportedError
from easydel.layers.attention.bias import AttentionBias
from easydel.layers.attention.continued import behind_a_cache, continued
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.masking import masked
from easydel.layers.attention.one_query import is_one_query, one_query
from easydel.layers.attention.online import exponentials, sink_column
from easydel.layers.attention.ring import ring, ring_obstacle
from easydel.sharding import constrain

MAX_BLOCKS = 16
"""The blockwise mechanism makes its blocks larger rather than more of them: each is compiled on its own."""

FUSED_DIM = 256
"""The largest head that the fused kernel of a GPU takes."""

Dropout = Callable[[jax.Array], jax.Array]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    mechanism: str,
    scale: float,
    block_size: int = 128,
    softcap: float | None = None,
    bias: AttentionBias | None = None,
    sinks: jax.Array | None = None,
    precision: Any = None,
    dropout: Dropout | None = None,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute attention.

    Args:
        query: `[batch, queries, heads, dim]`.
        key: `[batch, keys, kv_heads, dim]`.
        value: `[batch, keys, kv_heads, dim]`.
        mask: who may attend to whom.
        mechanism: `"auto"`, `"vanilla"`, `"sdpa"`, `"blockwise"` or `"ring"`.
        scale: factor of the products.
        block_size: queries per block (blockwise).
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        bias: makes what is added to the products.
        sinks: a logit of each query head, `[heads]`, that takes part in the softmax and stands for no key; or `None`.
        precision: of the products.
        dropout: applied to the weights, if active.
        return_weights: whether the weights are wanted; they are computed by the vanilla mechanism.

    Returns:
        `[batch, queries, heads, dim]` in the query's dtype, and the weights `[batch, heads, queries, keys]` or `None`.

    Raises:
        UnsupportedError: `"sdpa"` was asked for with a soft-cap, sinks or dropout, or `"ring"` where it cannot run.
    """
    options: dict[str, Any] = {"scale": scale, "bias": bias, "precision": precision}
    if mechanism in ("auto", "ring"):
        obstacle = ring_obstacle(query, key, mask, has_dropout=dropout is not None, return_weights=return_weights)
        if obstacle is None:
            return ring(query, key, value, mask, softcap=softcap, sinks=sinks, **options), None
        if mechanism == "ring":
            raise UnsupportedError(
                f"attn_mechanism='ring' cannot run here: {obstacle}; use 'auto', which takes another way where it must"
            )
    # Each device has its part of the queries and needs all keys: gathered, they are sent once; left to itself, the
    # compiler may split the sums over keys instead and reduce the weights and results.
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    if mechanism == "auto":
        plain = all(extra is None for extra in (softcap, bias, sinks, dropout))
        plain &= query.shape[-1] == value.shape[-1] <= FUSED_DIM
        mechanism = _choose(query, mask, block_size, plain=plain)
        simple = mechanism == "vanilla" and bias is None and dropout is None and not return_weights
        of_products: dict[str, Any] = {"scale": scale, "softcap": softcap, "precision": precision}
        if simple and sinks is None and is_one_query(query, key, value):
            otherwise = functools.partial(vanilla, **of_products)
            return one_query(query, key, value, mask, scale=scale, softcap=softcap, otherwise=otherwise), None
        if simple and behind_a_cache(mask, query.shape[1], key.shape[1]):
            return continued(query, key, value, mask, **of_products, sinks=sinks, block_size=block_size), None
    refused = {"soft-capping": softcap, "sinks": sinks, "dropout on attention weights": dropout}
    if mechanism == "sdpa" and (what := next((name for name, given in refused.items() if given is not None), None)):
        raise UnsupportedError(
            f"attn_mechanism='sdpa' with {what} is not supported; use 'auto', 'vanilla' or 'blockwise'"
        )
    by_hand: dict[str, Any] = options | {"softcap": softcap, "sinks": sinks, "dropout": dropout}
    if mechanism == "vanilla" or return_weights:
        out, weights = vanilla(query, key, value, mask, **by_hand)
        return out, weights if return_weights else None
    if mechanism == "sdpa":
        return sdpa(query, key, value, mask, **options), None
    return blockwise(query, key, value, mask, block_size=block_size, **by_hand), None


def _choose(query: jax.Array, mask: AttentionMask, block_size: int, *, plain: bool) -> str:
    half_precision = query.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() == "gpu" and half_precision and plain and query.shape[1] > 1:
        return "sdpa"
    skips_keys = mask.offset is None and (mask.causal or mask.window is not None)
    return "blockwise" if skips_keys and query.shape[1] >= 2 * block_size else "vanilla"


def vanilla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: AttentionBias | None = None,
    sinks: jax.Array | None = None,
    precision: Any = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute all products at once; return the weights, too."""
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
    products = jnp.einsum("bqkgd,btkd->bkgqt", grouped, key, precision=precision, preferred_element_type=jnp.float32)
    products = masked(products, mask, range(length), range(key.shape[1]), scale, softcap, bias)
    if sinks is None:
        weights = jax.nn.softmax(products, axis=-1).astype(query.dtype)
    else:
        weights, total = exponentials(products, sink_column(sinks, key.shape[2]))
        weights = (weights / total).astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    out = jnp.einsum("bkgqt,btkd->bqkgd", weights, value, precision=precision)
    return out.reshape(batch, length, heads, value.shape[-1]), weights.reshape(batch, heads, length, -1)


def blockwise(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    block_size: int,
    softcap: float | None = None,
    bias: AttentionBias | None = None,
    sinks: jax.Array | None = None,
    precision: Any = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Compute block of queries by block of queries, leaving out keys that no query of the block can see.

    Heads come first while it lasts: one transposition instead of two in each block. The sums that normalise the
    weights divide the results, which are fewer.
    """
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    size, column = max(block_size, -(-length // MAX_BLOCKS)), sink_column(sinks, key.shape[1])
    outputs = []
    for start in range(0, length, size):
        queries = range(start, min(start + size, length))
        keys = mask.key_range(queries, key.shape[2])
        part = slice(keys.start, keys.stop)
        products = jnp.einsum(
            "bkgqd,bktd->bkgqt",
            grouped[:, :, :, start : queries.stop],
            key[:, :, part],
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        products = masked(products, mask, queries, keys, scale, softcap, bias)
        weights, total = exponentials(products, column)
        weights = weights.astype(query.dtype)
        if dropout is not None:
            weights = dropout(weights)
        out = jnp.einsum(
            "bkgqt,bktd->bkgqd", weights, value[:, :, part], precision=precision, preferred_element_type=jnp.float32
        )
        outputs.append((out / total).astype(query.dtype))
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, value.shape[-1])


def sdpa(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    bias: AttentionBias | None,
    precision: Any,
) -> jax.Array:
    """Use JAX's own attention: cuDNN's fused kernel in half precision on a GPU, XLA elsewhere."""
    fused = jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
    # Its causal order starts at the first key, which is ours only without a cache.
    only_causal = mask.causal and mask.window is None and mask.key_valid is None and mask.query_segments is None
    is_causal = only_causal and mask.offset is None
    queries, keys = range(query.shape[1]), range(key.shape[1])
    dims = (query.shape[-1], value.shape[-1])
    query, key, value = (_widened(x, max(dims)) for x in (query, key, value))  # it wants all alike
    visible = None if is_causal else mask.visible(queries, keys)
    added = None
    if bias is not None:  # cuDNN's takes none that is the same for all queries
        added = bias(mask, queries, keys).astype(query.dtype)
        added = jnp.broadcast_to(added, (*added.shape[:2], len(queries), len(keys)))
    with jax.default_matmul_precision(_precision_name(precision)):
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=added,
            mask=visible,
            scale=scale,
            is_causal=is_causal,
            implementation="cudnn" if fused else "xla",
        )
    return out if dims[0] == dims[1] else out[..., : dims[1]]


def _widened(x: jax.Array, dim: int) -> jax.Array:
    """Return heads `[…, dim]` with zeros behind what they have."""
    return x if x.shape[-1] == dim else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, dim - x.shape[-1])))


def _precision_name(precision: Any) -> Any:
    if precision is None:
        return jax.config.values["jax_default_matmul_precision"]
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
