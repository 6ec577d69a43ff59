"""The experts: gated MLPs whose weights are stacked, on one device or many."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.layers.activations import activation
from easydel.layers.linear import normal_init
from easydel.layers.moe.dispatch import gather_back, is_local, sort_by_expert, spread, sum_choices
from easydel.layers.moe.mechanisms import grouped_product
from easydel.layers.moe.router import Routing
from easydel.paths import named_variables, to_state
from easydel.sharding import activation_spec, current_mesh, is_on_one_device


class ExpertLinear(nnx.Module):
    """The same linear layer of every expert: `kernel` `[experts, in, out]`.

    `Experts` asks such a layer for nothing but what is here, so that a layer with other weights (quantized ones, or a
    subclass that adds to `product`) may stand in its place.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, init_stddev: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(normal_init(init_stddev)(rngs.params(), shape, param_dtype))
        self.dtype, self.param_dtype = dtype, param_dtype

    def product(self, rows: jax.Array, sizes: jax.Array, *, mechanism: str, precision: Any) -> jax.Array:
        """Multiply each row by the weights of its expert; the one place where these are used.

        On a mesh this is one device's part: of the experts, and of the inputs or outputs.

        Args:
            rows: `[rows, in]` in the compute dtype, sorted by expert.
            sizes: int32 `[experts]`: the first `sizes[0]` rows are expert 0's, the next `sizes[1]` expert 1's, ….
            mechanism: `config.moe_mechanism`.
            precision: of the products.

        Returns:
            `[rows, out]` in the compute dtype; rows beyond `sum(sizes)` are not defined.
        """
        kernels = self.kernel.get_value().astype(self.dtype)
        return grouped_product(rows, sizes, kernels, mechanism=mechanism, precision=precision)

    def spec_of(self, name: str, kernel_spec: PartitionSpec) -> PartitionSpec:
        """Return how one of its arrays is split where the kernel is split as `kernel_spec` says."""
        del name
        return kernel_spec

    def adds_up(self, parts: int) -> bool:
        """Whether the products of `parts` equal parts of the inputs and weights add up to that of the whole."""
        del parts
        return True


class Experts(nnx.Module):
    """`num_experts` gated MLPs; each token's result is the weighted sum of those it goes to. No token is dropped.

    On a mesh each device computes the experts it holds (`ep`) with its part of their width (`tp`), for the tokens of
    its part of the batch; the results are then summed over those axes.

    Args:
        hidden_size: size of the input and output.
        intermediate_size: of an expert.
        num_experts: how many there are.
        act: name of the activation.
        combine: makes of gate and up what goes into down, an object that is equal to those like it; `None`:
            `act(gate) · up`.
        use_bias: whether gate, up and down have a bias. Those stand beside the layers, which a quantized one or one
            with an adapter may replace.
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
        combine: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        use_bias: bool = False,
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
        if use_bias:
            self.gate_bias, self.up_bias, self.down_bias = (
                nnx.Param(jnp.zeros((num_experts, features), param_dtype))
                for features in (intermediate_size, intermediate_size, hidden_size)
            )
        self.use_bias, self.combine = use_bias, combine
        self.act, self.mechanism, self.precision = activation(act), mechanism, precision
        self.num_experts, self.width, self.dtype = num_experts, intermediate_size, dtype

    def __call__(self, x: jax.Array, routing: Routing) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        x = x.astype(self.dtype)
        layers = self.gate_proj, self.up_proj, self.down_proj
        biases = self._biases()
        mesh = current_mesh()
        if mesh is None or is_on_one_device():
            out = self._compute(x, routing.weights, routing.experts, layers, biases, self.num_experts)
            return out.astype(self.dtype)

        tokens = activation_spec(x.shape, "batch", "sequence", None)
        wide = activation_spec((self.num_experts, x.shape[-1], self.width), "experts", None, "mlp")
        parts = math.prod(mesh.shape[axis] for axis in _axes(wide[2]))
        if not self.down_proj.adds_up(parts):  # each device computes with the whole width
            wide = PartitionSpec(wide[0], None, None)
        split = PartitionSpec(wide[0], wide[2], None)
        summed = tuple(axis for entry in (wide[0], wide[2]) for axis in _axes(entry) if mesh.shape[axis] > 1)
        arrays = tuple({path: v.get_value() for path, v in named_variables(layer).items()} for layer in layers)
        graphdefs = [nnx.graphdef(layer) for layer in layers]

        held = self.num_experts // math.prod(mesh.shape[axis] for axis in _axes(wide[0]))

        def part(x: jax.Array, weights: jax.Array, experts: jax.Array, arrays: Any, biases: Any) -> jax.Array:
            first = jax.lax.axis_index(_axes(wide[0])) * held if wide[0] else 0
            own = [nnx.merge(g, to_state(part), copy=True) for g, part in zip(graphdefs, arrays, strict=True)]
            if biases and wide[2]:  # down's, which is not split, counts once in the sum over parts of the width
                is_first = jax.lax.axis_index(_axes(wide[2])) == 0
                biases = (*biases[:2], jnp.where(is_first, biases[2], 0))
            out = self._compute(x, weights, experts - first, own, biases, held)
            return (jax.lax.psum(out, summed) if summed else out).astype(self.dtype)

        specs = tuple(
            {path: layer.spec_of(path, spec) for path in own}
            for layer, own, spec in zip(layers, arrays, (wide, wide, split), strict=True)
        )
        # Its check of what is replicated does not see through a custom gradient's loops.
        of_biases = tuple(PartitionSpec(wide[0], width) for width in (wide[2], wide[2], None)) if biases else ()
        places = (tokens, tokens, tokens, specs, of_biases)
        divided = jax.shard_map(part, mesh=mesh, in_specs=places, out_specs=tokens, check_vma=False)
        return divided(x, routing.weights, routing.experts, arrays, biases)

    def _biases(self) -> tuple[jax.Array, ...]:
        """Return the biases of gate, up and down in the compute dtype; empty: there are none."""
        if not self.use_bias:
            return ()
        return tuple(b.get_value().astype(self.dtype) for b in (self.gate_bias, self.up_bias, self.down_bias))

    def _compute(
        self,
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        layers: Sequence[Any],
        biases: Sequence[jax.Array],
        held: int,
    ) -> jax.Array:
        """Return the sum, float32 `[batch, seq, hidden]`, over those of the `experts` that are below `held`."""
        top_k, options = experts.shape[-1], {"mechanism": self.mechanism, "precision": self.precision}
        order = sort_by_expert(experts.reshape(-1, top_k), held)
        rows = spread(x.reshape(-1, x.shape[-1]), order, top_k)
        products: list[Callable[..., jax.Array]] = [
            functools.partial(layer.product, sizes=order.sizes, **options) for layer in layers
        ]
        if biases:
            of_row = jnp.clip(experts.reshape(-1)[order.source], 0, held - 1)
            products = [_with_bias(product, b, of_row) for product, b in zip(products, biases, strict=True)]
        gate, up = (product(rows) for product in products[:2])
        hidden = self.act(gate) * up if self.combine is None else self.combine(gate, up)
        pairs = gather_back(products[2](hidden), order).astype(jnp.float32)
        if current_mesh() is not None:  # experts of other devices
            pairs = jnp.where(is_local(order)[:, None], pairs, 0)
        weighted = pairs.reshape(-1, top_k, x.shape[-1]) * weights.reshape(-1, top_k, 1)
        return sum_choices(weighted).reshape(x.shape)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _with_bias(product: Callable[..., jax.Array], bias: jax.Array, of_row: jax.Array) -> Callable[..., jax.Array]:
    return lambda rows: product(rows) + bias[of_row]
