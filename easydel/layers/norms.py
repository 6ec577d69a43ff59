"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.rngs import shape_rngs


def layer_norm(
    features: int,
    epsilon: float,
    *,
    dtype: Any,
    param_dtype: Any,
    use_bias: bool = True,
    use_scale: bool = True,
    **ignored: Any,
) -> nnx.LayerNorm:
    """Make a LayerNorm (arXiv:1607.06450) with exact statistics, in float32.

    Args:
        features: size of the last axis.
        epsilon: added to the variance.
        dtype: of the result.
        param_dtype: of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        **ignored: other options of layers, which a norm has no use for.
    """
    del ignored
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_bias=use_bias,
        use_scale=use_scale,
        use_fast_variance=False,  # the difference of two large means loses digits
        rngs=shape_rngs(),  # the initial values are constants
    )


class RMSNorm(nnx.Module):
    """`x / rms(x) · (offset + scale)` over the last axis, statistics in float32 (arXiv:1910.07467).

    Args:
        features: size of the last axis.
        epsilon: added to the mean square.
        offset: added to `scale`; 1 for families that store the scale as its distance from one.
        init_scale: what a new norm multiplies by.
        dtype: of the result.
        param_dtype: of the stored scale.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        offset: float = 0.0,
        init_scale: float = 1.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.full((features,), init_scale - offset, param_dtype))
        self.epsilon, self.offset = epsilon, offset
        self.dtype, self.param_dtype = dtype, param_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., features]`."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale.get_value()
        if self.offset:  # the sum is taken in float32, before the result is rounded
            return (normed * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class HeadLayerNorm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) of each head, with a scale of its own and no bias; statistics in float32.

    Args:
        heads: how many there are.
        head_dim: size of one.
        epsilon: added to the variance.
        dtype: of the result.
        param_dtype: of the scales.
    """

    def __init__(self, heads: int, head_dim: int, *, epsilon: float, dtype: Any, param_dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((heads, head_dim), param_dtype))
        self.epsilon, self.dtype, self.param_dtype = epsilon, dtype, param_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[batch, seq, heads, head_dim]`."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (normed * self.scale.get_value().astype(jnp.float32)).astype(self.dtype)


class OffsetLayerNorm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) whose stored scale is its distance from one, so that decay draws it towards one.

    Statistics, scale and bias are applied in float32.

    Args:
        features: size of the last axis.
        epsilon: added to the variance.
        init_scale: what a new norm multiplies by.
        dtype: of the result.
        param_dtype: of the stored scale and of the bias.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        init_scale: float = 1.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.full((features,), init_scale - 1.0, param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.epsilon, self.dtype, self.param_dtype = epsilon, dtype, param_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `[..., features]`."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (variable.get_value().astype(jnp.float32) for variable in (self.scale, self.bias))
        return (normed * (1.0 + scale) + bias).astype(self.dtype)


class GatedRMSNorm(nnx.Module):
    """`x · silu(gate) / rms · scale`, the mean square taken over each group of features, in float32.

    Args:
        features: size of the last axis.
        groups: how many groups it has; must divide it.
        epsilon: added to the mean square.
        norm_first: whether the gate is applied to what is normed and scaled, and takes no part in the mean square.
        dtype: of the result.
        param_dtype: of the stored scale.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int,
        epsilon: float,
        norm_first: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.groups, self.epsilon, self.norm_first = groups, epsilon, norm_first
        self.dtype, self.param_dtype = dtype, param_dtype

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Gate and normalise `[..., features]`."""
        wide, gate = x.astype(jnp.float32), jax.nn.silu(gate.astype(jnp.float32))
        if not self.norm_first:
            wide = wide * gate
        grouped = wide.reshape(*wide.shape[:-1], self.groups, -1)
        normed = grouped * jax.lax.rsqrt(jnp.mean(grouped * grouped, axis=-1, keepdims=True) + self.epsilon)
        scaled = normed.reshape(wide.shape) * self.scale.get_value().astype(jnp.float32)
        return (scaled * gate if self.norm_first else scaled).astype(self.dtype)
