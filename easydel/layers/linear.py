"""Linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import native
from easydel.sharding import is_on_one_device, sequence_is_split

MATRICES = (((1,), (0,)), ((), ()))
"""The dimension numbers of `[rows, in] @ [in, out]`."""


def product(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **options: Any) -> jax.Array:
    """Compute `jax.lax.dot_general`; a few rows on one CPU, as when tokens are generated, by a kernel of our own."""
    numbers = tuple(tuple(tuple(axes) for axes in pair) for pair in dimension_numbers)
    if numbers == MATRICES and lhs.ndim == 2 and is_on_one_device() and native.serves_few_rows(lhs, rhs):
        return native.few_rows(lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)


class Linear(nnx.Linear):
    """`nnx.Linear` (kernel `[in, out]`) that computes on `[rows, in]`.

    One plain matrix product instead of a batched one is the largest single gain in speed on CPU. Batch and sequence
    stay apart where the mesh splits the sequence: merged, no device would own a contiguous part.
    """

    def __init__(self, in_features: int, out_features: int, *, dot_general: Any = product, **options: Any) -> None:
        super().__init__(in_features, out_features, dot_general=dot_general, **options)

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map `[..., in]` to `[..., out]`."""
        if inputs.ndim < 3 or sequence_is_split():
            return super().__call__(inputs)
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], flat.shape[-1])


def stddev_of(init_stddev: float | Mapping[str, float], name: str) -> float:
    """Return the deviation of a projection's initial weights, given one for all or one by name."""
    return init_stddev[name] if isinstance(init_stddev, Mapping) else init_stddev


def normal_init(stddev: float) -> jax.nn.initializers.Initializer:
    """Return the initializer transformers uses for weights: a normal distribution."""
    return jax.nn.initializers.normal(stddev, dtype=jnp.float32)
