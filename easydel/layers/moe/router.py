"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.struct import dataclass

from easydel.layers.linear import normal_init
from easydel.sharding import activation_spec, at_use, current_mesh, is_on_one_device


@dataclass
class Routing:
    """What a router says of each token.

    Attributes:
        logits: `[batch, seq, experts]`, in the compute dtype.
        weights: float32 `[batch, seq, top_k]`, of the chosen experts.
        experts: int32 `[batch, seq, top_k]`, the chosen experts, the likeliest first.
    """

    logits: jax.Array
    weights: jax.Array
    experts: jax.Array


class Router(nnx.Module):
    """Chooses the `top_k` experts of the largest probability (arXiv:1701.06538, section 2.1).

    Probabilities are the softmax over all experts, in float32. Not a `Linear`, so that neither quantization nor LoRA
    takes it for one.

    Args:
        hidden_size: size of the input.
        num_experts: how many there are.
        top_k: how many a token goes to.
        normalize: whether the chosen experts' weights are divided by their sum: the softmax over those alone.
        use_bias: whether the logits have a bias.
        init_stddev: of the initial kernel, `[hidden, experts]`, and bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        normalize: bool = True,
        use_bias: bool = False,
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"each token goes to {top_k} of {num_experts} experts: choose from 1 to {num_experts}")
        initial = normal_init(init_stddev)
        self.kernel = nnx.Param(initial(rngs.params(), (hidden_size, num_experts), param_dtype))
        self.bias = nnx.data(nnx.Param(initial(rngs.params(), (num_experts,), param_dtype)) if use_bias else None)
        self.top_k, self.normalize = top_k, normalize
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision

    def __call__(self, x: jax.Array) -> Routing:
        """Route tokens `[batch, seq, hidden]`."""
        kernel = at_use(self.kernel.get_value().astype(self.dtype), x, None, None)
        logits = jnp.dot(x.astype(self.dtype), kernel, precision=self.precision)
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(self.dtype)
        return Routing(logits, *self.choose(logits.astype(jnp.float32)))

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights and numbers of the experts, `[batch, seq, top_k]`, given float32 `[batch, seq, experts]`."""
        weights, experts = self._largest(jax.nn.softmax(logits, axis=-1))
        return weights / weights.sum(axis=-1, keepdims=True) if self.normalize else weights, experts

    def _largest(self, probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the largest of `[batch, seq, experts]` and which they are; on a mesh each device asks its own tokens.

        The compiler would gather all tokens on every device first.
        """

        def largest(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights, experts = jax.lax.top_k(part, self.top_k)
            return weights, experts

        mesh = current_mesh()
        if mesh is None or is_on_one_device():
            return largest(probabilities)
        tokens = activation_spec(probabilities.shape, "batch", "sequence", None)
        return jax.shard_map(largest, mesh=mesh, in_specs=tokens, out_specs=(tokens, tokens))(probabilities)


class Jitter(nnx.Module):
    """Multiplies by noise uniform in `[1 - amount, 1 + amount]`; off until `train()` or `rngs` (arXiv:2101.03961)."""

    def __init__(self, amount: float, *, rngs: nnx.Rngs) -> None:
        self.amount, self.deterministic = amount, True
        self.rngs = rngs["dropout"].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map any shape to the same."""
        if self.deterministic:
            return x
        return x * jax.random.uniform(self.rngs(), x.shape, x.dtype, 1.0 - self.amount, 1.0 + self.amount)
