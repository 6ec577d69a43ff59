"""The experts: gated MLPs whose weights are stacked, on one device or many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.layers.activations import activation
from easydel.layers.linear import normal_init
from easydel.layers.moe.dispatch import gather_back, is_local, sort_by_expert, spread, sum_choices
from easydel.layers.moe.mechanisms import Kernels, block_size, blocks, choose, grouped, ragged
from easydel.layers.moe.router import Routing
from easydel.sharding import activation_spec, current_mesh, is_on_one_device


class ExpertLinear(nnx.Module):
    """The same linear layer of every expert: `kernel` `[experts, in, out]`."""

    def __init__(
        self, shape: tuple[int, int, int], *, init_stddev: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(normal_init(init_stddev)(rngs.params(), shape, param_dtype))
        self.dtype, self.param_dtype = dtype, param_dtype

    def weights(self) -> jax.Array:
        """Return the kernel in the compute dtype."""
        return self.kernel.get_value().astype(self.dtype)


class Experts(nnx.Module):
    """`num_experts` gated MLPs; each token's result is the weighted sum of those it goes to. No token is dropped.

    On a mesh each device computes the experts it holds (`ep`) with its part of their width (`tp`), for the tokens of
    its part of the batch; the results are then summed over those axes.

    Args:
        hidden_size: size of the input and output.
        intermediate_size: of an expert.
        num_experts: how many there are.
        act: name of the activation.
        mechanism: how they are computed (`config.moe_mechanism`).
        init_stddev: of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        act: str,
        mechanism: str = "auto",
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(features_in: int, features_out: int) -> ExpertLinear:
            shape, dtypes = (num_experts, features_in, features_out), {"dtype": dtype, "param_dtype": param_dtype}
            return ExpertLinear(shape, init_stddev=init_stddev, rngs=rngs, **dtypes)

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)
        self.act, self.mechanism, self.precision = activation(act), mechanism, precision
        self.dtype = dtype

    def __call__(self, x: jax.Array, routing: Routing) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        x = x.astype(self.dtype)
        kernels = self.gate_proj.weights(), self.up_proj.weights(), self.down_proj.weights()
        mesh = current_mesh()
        if mesh is None or is_on_one_device():
            return self._compute(x, routing.weights, routing.experts, kernels).astype(self.dtype)

        tokens = activation_spec(x.shape, "batch", "sequence", None)
        wide = activation_spec(kernels[0].shape, "experts", None, "mlp")
        split = PartitionSpec(wide[0], wide[2], None)
        summed = tuple(axis for entry in (wide[0], wide[2]) for axis in _axes(entry) if mesh.shape[axis] > 1)

        def part(x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels) -> jax.Array:
            held = kernels[0].shape[0]
            first = jax.lax.axis_index(_axes(wide[0])) * held if wide[0] else 0
            out = self._compute(x, weights, experts - first, kernels)
            return (jax.lax.psum(out, summed) if summed else out).astype(self.dtype)

        places = (tokens, tokens, tokens, (wide, wide, split))
        # Its check of what is replicated does not see through a custom gradient's loops.
        divided = jax.shard_map(part, mesh=mesh, in_specs=places, out_specs=tokens, check_vma=False)
        return divided(x, routing.weights, routing.experts, kernels)

    def _compute(self, x: jax.Array, weights: jax.Array, experts: jax.Array, kernels: Kernels) -> jax.Array:
        """Return the sum, float32 `[batch, seq, hidden]`, over those `experts` that `kernels` hold."""
        top_k, held = experts.shape[-1], kernels[0].shape[0]
        mechanism = choose(self.mechanism, x, kernels)
        in_blocks = mechanism == "blocks"
        # One token's experts differ: blocks of one row read each once, and a padded block would be slower.
        size = block_size(experts.size, held) if experts.size > top_k else 1
        order = sort_by_expert(experts.reshape(-1, top_k), held, padding=size if in_blocks else 0)
        rows = spread(x.reshape(-1, x.shape[-1]), order, top_k)
        if in_blocks:
            rows = blocks(rows, order.sizes, kernels, self.act, self.precision, size)
        else:
            compute = grouped if mechanism == "grouped" else ragged
            rows = compute(rows, order.sizes, kernels, self.act, self.precision)
        pairs = gather_back(rows, order).astype(jnp.float32)
        if current_mesh() is not None:  # experts of other devices
            pairs = jnp.where(is_local(order)[:, None], pairs, 0)
        weighted = pairs.reshape(-1, top_k, x.shape[-1]) * weights.reshape(-1, top_k, 1)
        return sum_choices(weighted).reshape(x.shape)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
