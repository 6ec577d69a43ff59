"""The layer of a gated delta network (arXiv:2412.06464): projections, short convolution, delta rule, gated norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import RecurrentCache
from easydel.layers.activations import activation
from easydel.layers.delta import delta_scan, delta_step
from easydel.layers.linear import Linear, normal_init, project
from easydel.layers.norms import GatedRMSNorm
from easydel.layers.places import Places
from easydel.layers.ssm import causal_conv
from easydel.layers.stack import LayerInputs, LayerOutput
from easydel.sharding import constrain


class GatedDeltaNet(nnx.Module):
    """Mixes tokens by a state in which each of them replaces what its key had written before by its value.

    Padding neither changes the state nor enters the convolution; segments of packed sequences (runs of equal
    `segment_ids`) do not see one another. Projections give the numbers of one key head after another, query, key,
    values and gates of each, and so do the devices of a mesh keep them.

    Args:
        hidden_size: size of the input and output.
        num_heads: heads of values and of the state.
        num_key_heads: heads of queries and keys, each for as many of the others; must divide `num_heads`.
        key_dim: size of a query and key.
        value_dim: size of a value.
        conv_kernel: how many tokens the convolution sees.
        act: name of the activation after the convolution.
        epsilon: of the norm.
        chunk_size: tokens that are computed at once; it changes the cost only.
        init_stddev: of the initial weights.

    Raises:
        ValueError: the heads do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        conv_kernel: int,
        act: str,
        epsilon: float,
        chunk_size: int = 64,
        init_stddev: float = 0.02,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        rngs: nnx.Rngs,
    ) -> None:
        if num_key_heads < 1 or num_heads % num_key_heads:
            raise ValueError(
                f"linear_num_key_heads={num_key_heads} must divide linear_num_value_heads={num_heads}: each key head "
                "serves as many value heads"
            )
        dtypes, kernel_init = {"dtype": dtype, "param_dtype": param_dtype}, normal_init(init_stddev)
        options: dict[str, Any] = {"use_bias": False, "kernel_init": kernel_init, "rngs": rngs, **dtypes}
        values, self.width = num_heads * value_dim, 2 * key_dim + num_heads // num_key_heads * value_dim
        self.channels = num_key_heads * self.width
        linear = options | {"roles": (None, "heads"), "precision": precision}
        self.in_proj_qkvz = Linear(hidden_size, self.channels + values, **linear)
        self.in_proj_ba = Linear(hidden_size, 2 * num_heads, **linear)
        self.conv1d = nnx.Conv(
            self.channels,
            self.channels,
            conv_kernel,
            feature_group_count=self.channels,
            padding="CAUSAL",
            **options,
        )
        self.dt_bias = nnx.Param(jnp.ones((num_heads,), param_dtype))
        rates = jax.random.uniform(rngs.params(), (num_heads,), minval=0.01, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rates).astype(param_dtype))
        self.norm = GatedRMSNorm(value_dim, groups=1, epsilon=epsilon, norm_first=True, **dtypes)
        self.out_proj = Linear(values, hidden_size, **linear | {"roles": ("heads", None)})
        self.num_heads, self.num_key_heads, self.key_dim, self.value_dim = num_heads, num_key_heads, key_dim, value_dim
        self.conv_kernel, self.chunk_size = conv_kernel, chunk_size
        self.act, self.precision = activation(act), precision

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> RecurrentCache:
        """Make this layer's empty cache, of one size for any `max_length`."""
        del max_length
        state = (self.num_heads, self.key_dim, self.value_dim)
        return RecurrentCache.create(batch_size, self.conv_kernel, self.channels, state, dtype)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: RecurrentCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape and the updated cache."""
        # The state goes from token to token: a mesh that splits the sequence does not help here.
        hidden = constrain(hidden, "batch", None, None)
        mixed, gate, log_decay, beta = self._projected(hidden)
        places = Places.of(inputs.tokens, inputs.mask.query_segments)
        start = cache or self.init_cache(hidden.shape[0], 0, hidden.dtype)

        mixed, log_decay, beta = (places.gather(x) for x in (mixed, log_decay, beta))
        if places.kept is not None:
            log_decay, beta = (jnp.where(places.kept[..., None], x, 0.0) for x in (log_decay, beta))
        query, key, value = self._convolved(mixed, start.window, places.segments)
        y, state = self._ruled(query, key, value, log_decay, beta, start.state, places.segments)
        y = constrain(places.scatter(y), "batch", None, "heads", None)
        out = self.out_proj(self.norm(y, gate).reshape(*hidden.shape[:2], -1))
        return LayerOutput(out, None if cache is None else cache.advance(mixed, places.count, state))

    def _projected(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return what is convolved, gates, and float32 logarithms of decays and betas.

        Of shapes `[batch, seq, channels]`, `[batch, seq, heads, value_dim]` and twice `[batch, seq, heads]`.
        """
        rows, heads = hidden.shape[:2], ("batch", None, "heads", None)
        qkvz, ba = (
            constrain(x.reshape(*rows, self.num_key_heads, -1), *heads)
            for x in project(hidden, self.in_proj_qkvz, self.in_proj_ba)
        )
        mixed, gate = qkvz[..., : self.width], qkvz[..., self.width :]
        beta, steps = (x.reshape(*rows, self.num_heads).astype(jnp.float32) for x in jnp.split(ba, 2, axis=-1))
        rates, bias = (x.get_value().astype(jnp.float32) for x in (self.A_log, self.dt_bias))
        log_decay = -jnp.exp(rates) * jax.nn.softplus(steps + bias)
        gate = gate.reshape(*rows, self.num_heads, self.value_dim)
        return mixed.reshape(*rows, -1), gate, log_decay, jax.nn.sigmoid(beta)

    def _convolved(
        self, mixed: jax.Array, window: jax.Array, segments: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries and keys `[batch, seq, key heads, key_dim]` and values `[batch, seq, heads, value_dim]`."""
        # Its channels are all queries, then all keys, then all values; here those of a key head stand together.
        kernel, keys = self.conv1d.kernel.get_value()[:, 0], self.num_key_heads * self.key_dim
        parts = (kernel[:, :keys], kernel[:, keys : 2 * keys], kernel[:, 2 * keys :])
        kernel = jnp.concatenate([x.reshape(len(x), self.num_key_heads, -1) for x in parts], axis=-1)
        mixed = self.act(causal_conv(mixed, kernel.reshape(len(kernel), -1), None, window, segments))
        mixed = mixed.reshape(*mixed.shape[:2], self.num_key_heads, self.width)
        mixed = constrain(mixed, "batch", None, "heads", None)
        query, key, value = jnp.split(mixed, (self.key_dim, 2 * self.key_dim), axis=-1)
        value = value.reshape(*mixed.shape[:2], self.num_heads, self.value_dim)
        return _unit(query) * self.key_dim**-0.5, _unit(key), value

    def _ruled(
        self, query: Any, key: Any, value: Any, log_decay: Any, beta: Any, state: Any, segments: Any
    ) -> tuple[jax.Array, jax.Array]:
        if value.shape[1] == 1:
            query, key, value, log_decay, beta = (x[:, 0] for x in (query, key, value, log_decay, beta))
            y, state = delta_step(query, key, value, log_decay, beta, state, precision=self.precision)
            return y[:, None], state
        chunks: dict[str, Any] = {"chunk_size": self.chunk_size, "segments": segments, "precision": self.precision}
        return delta_scan(query, key, value, log_decay, beta, state, **chunks)


def _unit(x: jax.Array) -> jax.Array:
    """Return float32 vectors of length one, `[..., features]`; one of zeros stays as it is."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
