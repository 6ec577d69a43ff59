"""Ring attention: sequences stay split over `sp`, and keys and values go round (arXiv:2310.01889).

Each device keeps its queries. In as many turns as there are devices it meets the keys and values of one after another:
it passes those it has on to its neighbour while it computes with them. Only what a backward pass needs of a row of
products is kept, its largest and its sum; products are computed again there, and the gradients of keys and values
travel with them. So each device holds its part of a sequence, never the whole. Masks and biases are made of slots,
which go by the device that keys come from; what is known of each token (padding, segments) is whole on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from easydel.errors import UnsupportedError
from easydel.layers.attention.bias import AttentionBias
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.online import sink_column
from easydel.layers.attention.ring_turns import Ring, first_pass, second_pass
from easydel.sharding import constrain, current_mesh, sequence_is_split

AXIS = "sp"
KEPT = "ring_attention"
"""The name of what rematerialisation may keep, so that nothing has to go round once more."""

SPLIT, ROWS, WHOLE = PartitionSpec(None, AXIS), PartitionSpec(None, None, None, AXIS), PartitionSpec()


def ring_obstacle(
    query: jax.Array, key: jax.Array, mask: AttentionMask, *, has_dropout: bool, return_weights: bool
) -> str | None:
    """Return why a ring cannot compute this attention; `None`: it can."""
    mesh = current_mesh()
    if mesh is None or not sequence_is_split():
        return "no mesh splits the sequence here (it needs sp > 1)"
    if mask.offset is not None or mask.key_slots is not None:
        return "keys are those of a cache, which is not split along the sequence"
    if has_dropout:
        return "dropout on attention weights is on"
    if return_weights:
        return "the attention weights are asked for"
    parts = mesh.shape[AXIS]
    for what, length in (("queries", query.shape[1]), ("keys", key.shape[1])):
        if length % parts:
            return f"sp={parts} does not divide the {length} {what}"
    return None


def ring(
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
) -> jax.Array:
    """Compute attention on the ambient mesh, where `ring_obstacle` finds none; it is differentiable once, backwards.

    Args:
        query: `[batch, queries, heads, dim]`.
        key: `[batch, keys, kv_heads, dim]`.
        value: likewise.
        mask: without an `offset` and `key_slots`.
        scale: factor of the products.
        softcap: products `p` become `softcap · tanh(p / softcap)`.
        bias: makes what is added to the products.
        sinks: logits `[heads]` that take part in the softmax, or `None`.
        precision: of the products.

    Returns:
        `[batch, queries, heads, dim]` in the query's dtype, split over `sp`.
    """
    mesh: Any = current_mesh()
    batch, length, heads, dim = query.shape
    how = _How(mesh, Ring(AXIS, mesh.shape[AXIS], scale, softcap, precision))
    key, value = (constrain(x, "batch", "sequence", "heads", None) for x in (key, value))
    grouped = query.reshape(batch, length, key.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)
    out, reached = _ring(how, grouped, key, value, mask, bias)
    if (column := sink_column(sinks, key.shape[2])) is not None:  # what the keys have of the sum of keys and sink
        out = (out * jax.nn.sigmoid(reached - column)).astype(query.dtype)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, value.shape[-1])
    return constrain(out, "batch", "sequence", "heads", None)


@dataclass(frozen=True)
class _How:
    """What is static: the mesh, which is not ambient any more when a gradient is traced later, and settings."""

    mesh: Any
    ring: Ring


def _as_one(run: Callable[..., Any], given: Any, results: Any) -> Callable[..., Any]:
    """Make one operation of what each device runs: for whoever differentiates around it, kept or computed as a whole.

    JAX would take it apart. In a loop over layers masks depend on no layer, and it would make those of all turns
    beforehand, as large as all products (nothing is saved of what `checkpoint` holds); and policies that keep products
    would keep those (there is no rule by which to divide a `custom_vjp`).

    Args:
        run: takes a `Ring` and each device's part of the arguments, and returns its part of the results.
        given: partition specs of the arguments.
        results: of what it returns.
    """

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(
            "second derivatives through ring attention are not supported; set attn_mechanism='vanilla' in the config"
        )

    @functools.partial(jax.jit, static_argnums=0)
    def on_the_mesh(how: _How, *arguments: Any) -> Any:
        part = functools.partial(run, how.ring)
        split = jax.shard_map(part, mesh=how.mesh, in_specs=given, out_specs=results, axis_names={AXIS})
        return jax.checkpoint(split, prevent_cse=False)(*arguments)

    whole = jax.custom_vjp(on_the_mesh, nondiff_argnums=(0,))
    whole.defvjp(refuse, refuse)
    return whole


INPUTS, KEEPS = (ROWS, SPLIT, SPLIT, WHOLE, WHOLE), (ROWS, ROWS, ROWS)
_first_pass = _as_one(first_pass, INPUTS, KEEPS)
_second_pass = _as_one(second_pass, (*INPUTS, KEEPS, ROWS, ROWS), (ROWS, SPLIT, SPLIT, WHOLE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _How, query: Any, key: Any, value: Any, mask: AttentionMask, bias: Any) -> tuple[jax.Array, jax.Array]:
    """Return results, and the logarithm of the sum of each query's weights, float32 `[…, queries, 1]`."""
    return _results(_first_pass(how, query, key, value, mask, bias))


def _results(kept: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    out, largest, total = kept
    return out, largest + jnp.log(total)


def _forward_rule(how: _How, *given: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    kept = tuple(checkpoint_name(x, KEPT) for x in _first_pass(how, *given))
    return _results(kept), (*given, kept)


def _backward_rule(how: _How, kept: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    *of_inputs, of_bias = _second_pass(how, *kept, *gradients)
    return *of_inputs, None, of_bias


_ring.defvjp(_forward_rule, _backward_rule)
