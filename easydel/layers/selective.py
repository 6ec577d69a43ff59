"""The selective state-space layer of Mamba (arXiv:2312.00752): projections, short convolution, recurrence, gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import RecurrentCache
from easydel.layers.activations import activation
from easydel.layers.linear import Linear, normal_init, project
from easydel.layers.places import Places
from easydel.layers.selective_scan import selective_scan, selective_step
from easydel.layers.ssm import causal_conv
from easydel.layers.stack import LayerInputs, LayerOutput
from easydel.sharding import constrain


class SelectiveMixer(nnx.Module):
    """Mixes tokens by a state of each channel, whose decay, input and output the token itself chooses.

    Padding neither changes the state nor enters the convolution; segments of packed sequences (runs of equal
    `segment_ids`) do not see one another. Files hold `in_proj` and `gate_proj` as one; apart, a mesh can split both.

    Args:
        hidden_size: size of the input and output.
        channels: size between the two.
        state_size: of each channel.
        step_rank: size of what time steps are projected from.
        conv_kernel: how many tokens the convolution sees.
        act: name of the activation after the convolution; that of the gate is always SiLU.
        use_bias: whether the projections in and out have a bias.
        use_conv_bias: whether the convolution has one.
        make_norm: makes a norm of so many features for what time steps are projected from, what a token writes and
            what it reads; `None`: they are not normed.
        init_stddev: of initial weights, where the next arguments are `None`.
        conv_init: initializer of the convolution, `[conv_kernel, 1, channels]`.
        step_init: of the time steps' projection, `[step_rank, channels]`.
        step_bias_init: of the time steps' bias, before softplus, `[channels]`.
        out_init: of the projection out, `[channels, hidden]`.
    """

    def __init__(
        self,
        hidden_size: int,
        channels: int,
        *,
        state_size: int,
        step_rank: int,
        conv_kernel: int,
        act: str,
        use_bias: bool,
        use_conv_bias: bool,
        make_norm: Callable[[int], nnx.Module] | None = None,
        init_stddev: float = 0.02,
        conv_init: Callable[..., jax.Array] | None = None,
        step_init: Callable[..., jax.Array] | None = None,
        step_bias_init: Callable[..., jax.Array] = jax.nn.initializers.zeros,
        out_init: Callable[..., jax.Array] | None = None,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        initial, dtypes = normal_init(init_stddev), {"dtype": dtype, "param_dtype": param_dtype}

        def linear(features_in: int, features_out: int, roles: Any, use_bias: bool, init: Any = None) -> Linear:
            options: dict[str, Any] = {"kernel_init": init or initial, "precision": precision, "rngs": rngs, **dtypes}
            return Linear(features_in, features_out, roles=roles, use_bias=use_bias, **options)

        self.in_proj = linear(hidden_size, channels, (None, "mlp"), use_bias)
        self.gate_proj = linear(hidden_size, channels, (None, "mlp"), use_bias)
        self.conv1d = nnx.Conv(
            channels,
            channels,
            conv_kernel,
            feature_group_count=channels,
            padding="CAUSAL",
            use_bias=use_conv_bias,
            kernel_init=conv_init or initial,
            rngs=rngs,
            **dtypes,
        )
        self.x_proj = linear(channels, step_rank + 2 * state_size, ("mlp", None), False)
        self.dt_proj = linear(step_rank, channels, (None, "mlp"), False, step_init)
        # Added in float32: half precision would round the logarithm of a small time step by some percent.
        self.dt_bias = nnx.Param(step_bias_init(rngs.params(), (channels,), param_dtype))
        logarithms = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32)).astype(param_dtype)
        self.A_log = nnx.Param(jnp.tile(logarithms, (channels, 1)))
        self.D = nnx.Param(jnp.ones((channels,), param_dtype))
        self.out_proj = linear(channels, hidden_size, ("mlp", None), use_bias, out_init)
        self.dt_layernorm = None if make_norm is None else make_norm(step_rank)
        self.b_layernorm = None if make_norm is None else make_norm(state_size)
        self.c_layernorm = None if make_norm is None else make_norm(state_size)
        self.channels, self.state_size, self.step_rank = channels, state_size, step_rank
        self.conv_kernel, self.act = conv_kernel, activation(act)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> RecurrentCache:
        """Make this layer's empty cache, of one size for any `max_length`; each channel is a head of size one."""
        del max_length
        state = (self.channels, 1, self.state_size)
        return RecurrentCache.create(batch_size, self.conv_kernel, self.channels, state, dtype)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: RecurrentCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the updated cache."""
        # The state goes from token to token: a mesh that splits the sequence does not help here.
        hidden = constrain(hidden, "batch", None, None)
        mixed, gate = (constrain(part, "batch", None, "mlp") for part in project(hidden, self.in_proj, self.gate_proj))
        places = Places.of(inputs.tokens, inputs.mask.query_segments)
        start = cache or self.init_cache(hidden.shape[0], 0, hidden.dtype)

        mixed = places.gather(mixed)
        bias = None if self.conv1d.bias is None else self.conv1d.bias.get_value()
        x = self.act(causal_conv(mixed, self.conv1d.kernel.get_value()[:, 0], bias, start.window, places.segments))
        x = constrain(x, "batch", None, "mlp")
        steps, B, C = self._chosen(x)
        if places.kept is not None:
            steps = jnp.where(places.kept[..., None], steps, 0.0)
        y, state = self._mixed(x, steps, B, C, start.state[:, :, 0], places.segments)
        y += self.D.get_value().astype(jnp.float32) * x
        y = constrain(places.scatter(y), "batch", None, "mlp") * jax.nn.silu(gate.astype(jnp.float32))
        out = self.out_proj(y)
        return LayerOutput(out, None if cache is None else cache.advance(mixed, places.count, state[:, :, None]))

    def _chosen(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return time steps, float32 `[batch, seq, channels]`, and what tokens write and read, `[…, state_size]`."""
        chosen = constrain(self.x_proj(x), "batch", None, None)
        parts = jnp.split(chosen, (self.step_rank, self.step_rank + self.state_size), axis=-1)
        norms: tuple[Any, ...] = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        steps, B, C = (part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True))
        steps = self.dt_proj(steps).astype(jnp.float32) + self.dt_bias.get_value().astype(jnp.float32)
        return constrain(jax.nn.softplus(steps), "batch", None, "mlp"), B, C

    def _mixed(self, x: Any, steps: Any, B: Any, C: Any, state: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        A = -jnp.exp(self.A_log.get_value().astype(jnp.float32))
        if x.shape[1] > 1:
            return selective_scan(x, steps, A, B, C, state, segments=segments)
        y, state = selective_step(x[:, 0], steps[:, 0], A, B[:, 0], C[:, 0], state)
        return y[:, None], state
