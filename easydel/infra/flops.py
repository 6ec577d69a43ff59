"""FLOPs of a forward pass, counted from its traced program."""

from __future__ import annotations

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.calls import takes
from easydel.infra.construct import abstract_module


def count_matmul_flops(jaxpr: Any) -> int:
    """Count the floating-point operations of the matrix products in a jaxpr, loops multiplied out.

    A product of `[m, k]` and `[k, n]` counts `2·m·k·n`. A `while` loop counts once (its length is not known), of a
    `cond` the dearest branch.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            total += _dot_flops(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
        elif eqn.primitive.name == "cond":
            total += max(count_matmul_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * sum(count_matmul_flops(inner) for inner in inner_jaxprs(eqn))
    return total


def _dot_flops(eqn: Any) -> int:
    lhs = eqn.invars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * lhs[-1]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Return the jaxprs inside an equation."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def forward_flops(module_class: type, config: Any, batch_size: int, sequence_length: int) -> int:
    """Count the FLOPs of one forward pass of `[batch_size, sequence_length]` tokens, causal halving not counted.

    A model with an encoder reads as many tokens as it writes.

    The model is built and traced abstractly: nothing is allocated or computed.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "attn_mechanism"):
        config.attn_mechanism = "vanilla"  # the others skip masked keys, or hide their products in a kernel
    if hasattr(config, "moe_mechanism"):
        config.moe_mechanism = "ragged"  # counts each token's own experts; how often a loop runs is not known
    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
    module = abstract_module(module_class, config)
    names = ("input_ids", *(("decoder_input_ids",) if takes(module, "decoder_input_ids") else ()))
    graphdef, state = nnx.split(module)

    def forward(state: nnx.State, tokens: jax.Array) -> Any:
        return jax.tree.leaves(nnx.merge(graphdef, state)(**dict.fromkeys(names, tokens)))

    return count_matmul_flops(jax.make_jaxpr(forward)(state, tokens).jaxpr)
