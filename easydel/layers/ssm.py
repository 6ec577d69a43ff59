"""The state-space layer of Mamba-2 (arXiv:2405.21060): projection, short convolution, recurrence, gated norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.caching import RecurrentCache
from easydel.layers.activations import activation
from easydel.layers.linear import Linear, normal_init
from easydel.layers.norms import GatedRMSNorm
from easydel.layers.places import Places
from easydel.layers.ssd import ssd_scan, ssd_step
from easydel.layers.stack import LayerInputs, LayerOutput
from easydel.sharding import constrain


class StateSpaceMixer(nnx.Module):
    """Mixes tokens by a state that each of them decays, writes to and reads.

    Padding neither changes the state nor enters the convolution; segments of packed sequences (runs of equal
    `segment_ids`) do not see one another.

    Args:
        hidden_size: size of the input and output.
        num_heads: heads of the state.
        head_dim: size of a head.
        state_size: of each component of a head.
        num_groups: groups of heads that share what is written and read; must divide `num_heads`.
        conv_kernel: how many tokens the convolution sees.
        chunk_size: tokens that are computed at once; it changes the cost only.
        act: name of the activation after the convolution.
        use_bias: whether the projections have a bias.
        out_bias: whether the output projection has one; `None`: as the other has.
        use_conv_bias: whether the convolution has one.
        epsilon: of the norm.
        time_step_limit: least and greatest time step.
        norm: whether what comes out is normed; if not, it is only multiplied by the gate's `silu`.
        norm_first: whether the norm comes before the gate.
        multipliers: what the projected gate, x, B, C and time steps are multiplied by; `None`: nothing.
        time_step_init: least and greatest initial time step, and a floor under it; `None`: the time steps' biases begin
            at one, and convolution and output projection as the input projection does, not as torch's.
        out_scale: variance of the output's initial weights, relative to that of torch's linear layers.
        init_stddev: of the input projection's initial weights.

    Raises:
        ValueError: the groups do not divide the heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        state_size: int,
        num_groups: int,
        conv_kernel: int,
        chunk_size: int,
        act: str,
        use_bias: bool,
        use_conv_bias: bool,
        epsilon: float,
        time_step_limit: Sequence[float],
        time_step_init: tuple[float, float, float] | None,
        out_bias: bool | None = None,
        norm: bool = True,
        norm_first: bool = False,
        multipliers: Sequence[float] | None = None,
        out_scale: float = 1.0,
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(
                f"n_groups={num_groups} must divide num_heads={num_heads}: each group serves as many heads"
            )
        inner, channels = num_heads * head_dim, num_heads * head_dim + 2 * num_groups * state_size
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options: dict[str, Any] = {"precision": precision, "rngs": rngs, **dtypes}
        normal = normal_init(init_stddev)
        conv_init, out_init = (torch_init(), torch_init(out_scale)) if time_step_init else (normal, normal)
        self.in_proj = Linear(
            hidden_size,
            inner + channels + num_heads,
            roles=(None, "mlp"),
            use_bias=use_bias,
            kernel_init=normal,
            **options,
        )
        self.conv1d = nnx.Conv(
            channels,
            channels,
            conv_kernel,
            feature_group_count=channels,
            padding="CAUSAL",
            use_bias=use_conv_bias,
            kernel_init=conv_init,
            rngs=rngs,
            **dtypes,
        )
        steps = initial_time_steps(rngs.params(), num_heads, *time_step_init) if time_step_init else None
        self.dt_bias = nnx.Param((jnp.ones((num_heads,)) if steps is None else steps).astype(param_dtype))
        self.A_log = nnx.Param(jnp.log(jnp.arange(1, num_heads + 1, dtype=jnp.float32)).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((num_heads,), param_dtype))
        if norm:
            self.norm = GatedRMSNorm(inner, groups=num_groups, epsilon=epsilon, norm_first=norm_first, **dtypes)
        options |= {"use_bias": use_bias if out_bias is None else out_bias, "kernel_init": out_init}
        self.out_proj = Linear(inner, hidden_size, roles=("mlp", None), **options)
        self.num_heads, self.head_dim, self.state_size, self.num_groups = num_heads, head_dim, state_size, num_groups
        self.conv_kernel, self.chunk_size, self.act = conv_kernel, chunk_size, activation(act)
        self.time_step_limit, self.precision = tuple(time_step_limit), precision
        self.inner, self.channels, self.has_norm = inner, channels, norm
        self.multipliers = None if multipliers is None or set(multipliers) == {1.0} else tuple(multipliers)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> RecurrentCache:
        """Make this layer's empty cache, of one size for any `max_length`."""
        del max_length
        state = (self.num_heads, self.head_dim, self.state_size)
        return RecurrentCache.create(batch_size, self.conv_kernel, self.channels, state, dtype)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: RecurrentCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the updated cache."""
        # The state goes from token to token: a mesh that splits the sequence does not help here.
        hidden = constrain(hidden, "batch", None, None)
        gate, mixed, steps = _cut(self._multiplied(self.in_proj(hidden)), self.inner, self.inner + self.channels)
        steps = jax.nn.softplus(steps.astype(jnp.float32) + self.dt_bias.get_value().astype(jnp.float32))
        steps = constrain(jnp.clip(steps, *self.time_step_limit), "batch", None, "heads")
        places = Places.of(inputs.tokens, inputs.mask.query_segments)
        start = cache or self.init_cache(hidden.shape[0], 0, hidden.dtype)

        mixed, steps = places.gather(mixed), places.gather(steps)
        if places.kept is not None:
            steps = jnp.where(places.kept[..., None], steps, 0.0)
        x, B, C = self._convolved(mixed, start.window, places.segments)
        y, state = self._mixed(x, steps, B, C, start.state, places.segments)
        y += self.D.get_value().astype(jnp.float32)[:, None] * x
        y = constrain(places.scatter(y.reshape(*hidden.shape[:2], -1)), "batch", None, "heads")
        out = self.out_proj(self._gated(y, gate))
        return LayerOutput(out, None if cache is None else cache.advance(mixed, places.count, state))

    def _multiplied(self, projected: jax.Array) -> jax.Array:
        """Multiply what was projected, `[batch, seq, features]`, part by part."""
        if self.multipliers is None:
            return projected
        states = self.num_groups * self.state_size
        sizes = (self.inner, self.inner, states, states, self.num_heads)
        return projected * jnp.asarray(np.repeat(np.asarray(self.multipliers, np.float32), sizes), projected.dtype)

    def _gated(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        if self.has_norm:
            return self.norm(y, gate)
        return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)

    def _mixed(self, x: Any, steps: Any, B: Any, C: Any, state: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        A = -jnp.exp(self.A_log.get_value().astype(jnp.float32))
        if x.shape[1] == 1:
            one = (x[:, 0], steps[:, 0], A, B[:, 0], C[:, 0], state)
            y, state = ssd_step(*one, precision=self.precision)
            return y[:, None], state
        chunks: dict[str, Any] = {"chunk_size": self.chunk_size, "segments": segments, "precision": self.precision}
        return ssd_scan(x, steps, A, B, C, state, **chunks)

    def _convolved(
        self, mixed: jax.Array, window: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return x `[batch, seq, heads, head_dim]`, B and C `[batch, seq, groups, state_size]`, float32."""
        bias = None if self.conv1d.bias is None else self.conv1d.bias.get_value()
        mixed = self.act(causal_conv(mixed, self.conv1d.kernel.get_value()[:, 0], bias, window, segments))
        states = self.num_groups * self.state_size
        x, B, C = _cut(mixed, self.inner, self.inner + states)
        rows = mixed.shape[:2]
        x = constrain(x.reshape(*rows, self.num_heads, self.head_dim), "batch", None, "heads", None)
        B, C = (part.reshape(*rows, self.num_groups, self.state_size) for part in (B, C))
        return x, B, C


def _cut(x: jax.Array, *places: int) -> list[jax.Array]:
    """Cut `[batch, seq, features]` at places where no device's part of the features ends.

    So it is made whole first, and each device takes what it needs from its own copy: one gathering, where cutting
    what is split would send pieces from each device to the next.
    """
    whole = ("batch", None, None)
    return [constrain(part, *whole) for part in jnp.split(constrain(x, *whole), places, axis=-1)]


def causal_conv(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """Convolve each channel with its own kernel over a token and those before it, in float32.

    A few shifted products: XLA's depthwise convolution is many times slower on CPU.

    Args:
        inputs: `[batch, seq, channels]`.
        kernel: `[conv_kernel, channels]`; its last row is for the token itself.
        bias: `[channels]`.
        window: `[batch, conv_kernel - 1, channels]`, what came before.
        segments: int `[batch, seq]`, not decreasing; no token sees another's segment. 0 is that of the window.
    """
    size, length = kernel.shape[0], inputs.shape[1]
    seen = jnp.concatenate([window.astype(inputs.dtype), inputs], axis=1)
    total = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for lag in range(size):
        part = seen[:, size - 1 - lag : size - 1 - lag + length].astype(jnp.float32)
        if segments is not None and lag:
            before = jnp.pad(segments, ((0, 0), (lag, 0)))[:, :length]
            part = jnp.where((before == segments)[..., None], part, 0.0)
        total = total + part * kernel[size - 1 - lag].astype(jnp.float32)
    return total


def torch_init(scale: float = 1.0) -> jax.nn.initializers.Initializer:
    """Return torch's own initializer of linear layers and convolutions: uniform in ±1/√fan_in, times √scale."""
    return jax.nn.initializers.variance_scaling(scale / 3, "fan_in", "uniform")


def initial_time_steps(key: jax.Array, heads: int, least: float, greatest: float, floor: float) -> jax.Array:
    """Return biases whose softplus is log-uniform between `least` and `greatest`, but not below `floor`."""
    logarithm = jax.random.uniform(key, (heads,), minval=math.log(least), maxval=math.log(greatest))
    steps = jnp.maximum(jnp.exp(logarithm), floor)
    return steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus
