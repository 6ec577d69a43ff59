"""The feed-forward layer of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from easydel.layers.moe.experts import Experts
from easydel.layers.moe.router import Jitter, Router


class SparseMoE(nnx.Module):
    """A router at `gate` and its `experts` (arXiv:2401.04088, section 2.1).

    Args:
        hidden_size: size of the input and output.
        intermediate_size: of an expert.
        num_experts: how many there are.
        top_k: how many a token goes to.
        act: name of the activation.
        normalize: whether the weights of a token's experts are divided by their sum.
        use_bias: whether router and experts have biases.
        combine: makes of an expert's gate and up what goes into down; see `Experts`.
        make_router: makes the router, called as `Router` is.
        jitter: in training, the input is multiplied by noise in `[1 - jitter, 1 + jitter]`.
        mechanism: how the experts are computed (`config.moe_mechanism`).
        init_stddev: of the initial weights.
        shared_experts: a layer that every token goes to besides, what it gives is added; `None`: there is none.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        top_k: int,
        act: str,
        normalize: bool = True,
        use_bias: bool = False,
        combine: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        make_router: Callable[..., Router] = Router,
        jitter: float = 0.0,
        mechanism: str = "auto",
        init_stddev: float = 0.02,
        shared_experts: nnx.Module | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        options |= {"init_stddev": init_stddev, "use_bias": use_bias, "rngs": rngs}
        self.gate = make_router(hidden_size, num_experts, top_k=top_k, normalize=normalize, **options)
        options |= {"act": act, "combine": combine, "mechanism": mechanism}
        self.experts = Experts(hidden_size, intermediate_size, num_experts, **options)
        self.shared_experts: Any = shared_experts
        self.jitter = Jitter(jitter, rngs=rngs) if jitter > 0 else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map `[batch, seq, hidden]` to the same shape, and what the router says, `[batch, seq, experts]`."""
        if self.jitter is not None:
            x = self.jitter(x)
        routing = self.gate(x)
        mixed = self.experts(x, routing)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(x)
        return mixed, routing.logits
