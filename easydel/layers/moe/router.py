"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.struct import dataclass
from jax.sharding import PartitionSpec

from easydel.layers.buffer import Buffer
from easydel.layers.linear import normal_init
from easydel.sharding import activation_spec, at_use, current_mesh, is_on_one_device


@dataclass
class Routing:
    """What a router says of each token.

    Attributes:
        logits: `[batch, seq, experts]`, in the compute dtype, or float32 if the router computes in it.
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

    is_wide: ClassVar[bool] = False
    """Whether logits are computed in float32, and as exactly as that allows, whatever the compute dtype."""

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
        dtype = jnp.float32 if self.is_wide else self.dtype
        precision = jax.lax.Precision.HIGHEST if self.is_wide else self.precision
        kernel = at_use(self.kernel.get_value().astype(dtype), x, None, None)
        logits = jnp.dot(x.astype(dtype), kernel, precision=precision)
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(dtype)
        return Routing(logits, *self.choose(logits.astype(jnp.float32)))

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights and numbers of the experts, `[batch, seq, top_k]`, given float32 `[batch, seq, experts]`."""
        weights, experts = by_token(self._largest, jax.nn.softmax(logits, axis=-1))
        return weights / weights.sum(axis=-1, keepdims=True) if self.normalize else weights, experts

    def _largest(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, experts = jax.lax.top_k(scores, self.top_k)
        return weights, experts


class GroupLimitedRouter(Router):
    """Chooses among the experts of the best groups only (DeepSeek-V2, arXiv:2405.04434, section 2.2.2).

    Probabilities are the softmax over all experts; a group is as good as its best expert. Computed in float32.

    Args:
        *args: as of `Router`.
        groups: how many groups of equal size there are, of experts that follow one another; 1: no limit.
        top_groups: how many of them a token's experts come from.
        scaling: what the weights are multiplied by.
        **options: as of `Router`.

    Raises:
        ValueError: numbers of groups that do not fit the experts.
    """

    is_wide: ClassVar[bool] = True
    group_members: ClassVar[int] = 1
    """How many of a group's experts, the best ones, say how good it is."""

    def __init__(
        self, hidden_size: int, num_experts: int, *, groups: int, top_groups: int, scaling: float, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, **options)
        size = num_experts // groups if groups >= 1 and num_experts % groups == 0 else 0
        if size < self.group_members or not 1 <= top_groups <= groups or self.top_k > top_groups * size:
            raise ValueError(
                f"{self.top_k} experts of {top_groups} among {groups} groups of {num_experts} experts cannot be "
                "chosen: give groups that divide the experts, and enough of them to choose from"
            )
        self.groups, self.top_groups, self.scaling = groups, top_groups, scaling

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights and numbers of the experts, `[batch, seq, top_k]`, given float32 `[batch, seq, experts]`."""
        weights, experts = by_token(self._chosen, logits)
        return weights * self.scaling, experts

    def _chosen(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, experts = self._largest(self._of_best_groups(jax.nn.softmax(logits, axis=-1)))
        return weights / weights.sum(axis=-1, keepdims=True) if self.normalize else weights, experts

    def _of_best_groups(self, scores: jax.Array) -> jax.Array:
        """Return scores `[batch, seq, experts]` with those outside the best groups at the bottom."""
        if self.groups == 1:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        of_group = jax.lax.top_k(grouped, self.group_members)[0].sum(axis=-1)
        best = jax.lax.top_k(of_group, self.top_groups)[1]
        is_best = (best[..., None] == jnp.arange(self.groups)).any(axis=-2)
        return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(scores.shape)


class CorrectedRouter(GroupLimitedRouter):
    """Chooses by corrected scores, and weighs by scores (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    A score is the sigmoid of a logit; `e_score_correction_bias` `[experts]`, float32, is added to choose, so that
    whoever trains can balance the experts by it without a loss. A group is as good as the sum of its two best.
    Arguments are those of `GroupLimitedRouter`.
    """

    group_members: ClassVar[int] = 2

    def __init__(self, hidden_size: int, num_experts: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, **options)
        self.e_score_correction_bias = Buffer(jnp.zeros((num_experts,), jnp.float32))

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights and numbers of the experts, `[batch, seq, top_k]`, given float32 `[batch, seq, experts]`."""
        weights, experts = by_token(self._corrected, logits, self.e_score_correction_bias.get_value())
        return weights * self.scaling, experts

    def _corrected(self, logits: jax.Array, correction: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jax.nn.sigmoid(logits)
        _, experts = self._largest(self._of_best_groups(scores + correction))
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        return weights / (weights.sum(axis=-1, keepdims=True) + 1e-20) if self.normalize else weights, experts


def by_token(
    choose: Callable[..., tuple[jax.Array, jax.Array]], scores: jax.Array, *shared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Choose experts for each token; on a mesh each device does for its own tokens.

    The compiler would gather all tokens on every device first.

    Args:
        choose: `(scores, *shared)` → weights and experts, `[batch, seq, top_k]`.
        scores: `[batch, seq, experts]`.
        *shared: what is the same for all tokens.
    """
    mesh = current_mesh()
    if mesh is None or is_on_one_device():
        return choose(scores, *shared)
    tokens = activation_spec(scores.shape, "batch", "sequence", None)
    given = (tokens, *(PartitionSpec() for _ in shared))
    return jax.shard_map(choose, mesh=mesh, in_specs=given, out_specs=(tokens, tokens))(scores, *shared)


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
