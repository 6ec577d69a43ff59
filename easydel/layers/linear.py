"""Linear layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.sharding.activations import sequence_is_split


class Linear(nnx.Linear):
    """`nnx.Linear` (kernel `[in, out]`) that computes on `[rows, in]`.

    One plain matrix product instead of a batched one is the largest single gain in speed on CPU. Batch and sequence
    stay apart where the mesh splits the sequence: merged, no device would own a contiguous part.
    """

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map `[..., in]` to `[..., out]`."""
        if inputs.ndim < 3 or sequence_is_split():
            return super().__call__(inputs)
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], flat.shape[-1])


def normal_init(stddev: float) -> jax.nn.initializers.Initializer:
    """Return the initializer transformers uses for weights: a normal distribution."""
    return jax.nn.initializers.normal(stddev, dtype=jnp.float32)
