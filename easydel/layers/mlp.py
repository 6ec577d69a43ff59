"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from easydel.layers.activations import activation
from easydel.layers.dropout import make_dropout
from easydel.layers.linear import Linear, Spread, normal_init, project, stddev_of
from easydel.sharding import constrain


class GatedMLP(nnx.Module):
    """`down(act(gate_scale · gate(x)) · up(x))` (arXiv:2002.05202); arguments as of `MLP`."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        act: str,
        use_bias: bool = False,
        gate_scale: float = 1.0,
        dropout: float = 0.0,
        init_stddev: Spread | Mapping[str, Spread] = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(name: str, features_in: int, features_out: int) -> Linear:
            return Linear(
                features_in,
                features_out,
                roles=("mlp", None) if name == "down_proj" else (None, "mlp"),
                use_bias=use_bias,
                kernel_init=normal_init(stddev_of(init_stddev, name)),
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.gate_proj = linear("gate_proj", hidden_size, intermediate_size)
        self.up_proj = linear("up_proj", hidden_size, intermediate_size)
        self.down_proj = linear("down_proj", intermediate_size, hidden_size)
        self.act, self.gate_scale = activation(act), gate_scale
        self.dropout = make_dropout(dropout, rngs) if dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        hidden = self.act(gate if self.gate_scale == 1.0 else gate * self.gate_scale) * up
        return self.down_proj(_dropped(self.dropout, constrain(hidden, "batch", "sequence", "mlp")))


class MLP(nnx.Module):
    """`down(act(up(x)))`.

    Args:
        hidden_size: size of the input and output.
        intermediate_size: size between the two.
        act: name of the activation.
        use_bias: whether both projections have a bias.
        dropout: rate of dropout on what goes into `down`; off until `train()` or `rngs`.
        init_stddev: of the initial weights (or what draws them), all of them or by the name of the projection.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        act: str,
        use_bias: bool = True,
        dropout: float = 0.0,
        init_stddev: Spread | Mapping[str, Spread] = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"use_bias": use_bias, "rngs": rngs}
        options |= {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
        up, down = (normal_init(stddev_of(init_stddev, name)) for name in ("up_proj", "down_proj"))
        self.up_proj = Linear(hidden_size, intermediate_size, roles=(None, "mlp"), kernel_init=up, **options)
        self.down_proj = Linear(intermediate_size, hidden_size, roles=("mlp", None), kernel_init=down, **options)
        self.act = activation(act)
        self.dropout = make_dropout(dropout, rngs) if dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to the same shape."""
        hidden = constrain(self.act(self.up_proj(x)), "batch", "sequence", "mlp")
        return self.down_proj(_dropped(self.dropout, hidden))


def _dropped(dropout: nnx.Dropout | None, hidden: jax.Array) -> jax.Array:
    return hidden if dropout is None else dropout(hidden)
