"""Feed-forward layers."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from easydel.layers.activations import activation
from easydel.layers.linear import Linear, normal_init
from easydel.sharding import constrain


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) · up(x))` (arXiv:2002.05202)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        act: str,
        use_bias: bool = False,
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(features_in: int, features_out: int) -> Linear:
            return Linear(
                features_in,
                features_out,
                use_bias=use_bias,
                kernel_init=normal_init(init_stddev),
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)
        self.act = activation(act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        hidden = self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(hidden, "batch", "sequence", "mlp"))


class MLP(nnx.Module):
    """`down(act(up(x)))`.

    Args:
        hidden_size: size of the input and output.
        intermediate_size: size between the two.
        act: name of the activation.
        use_bias: whether both projections have a bias.
        init_stddev: of the initial weights.
        out_init_stddev: of those of the second projection, if different.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        act: str,
        use_bias: bool = True,
        init_stddev: float = 0.02,
        out_init_stddev: float | None = None,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"use_bias": use_bias, "precision": precision, "rngs": rngs}
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        out_stddev = init_stddev if out_init_stddev is None else out_init_stddev
        self.up_proj = Linear(hidden_size, intermediate_size, kernel_init=normal_init(init_stddev), **options)
        self.down_proj = Linear(intermediate_size, hidden_size, kernel_init=normal_init(out_stddev), **options)
        self.act = activation(act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        return self.down_proj(constrain(self.act(self.up_proj(x)), "batch", "sequence", "mlp"))
