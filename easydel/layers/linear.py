"""Linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import native
from easydel.sharding import at_use, is_on_one_device, sequence_is_split

MATRICES = (((1,), (0,)), ((), ()))
"""The dimension numbers of `[rows, in] @ [in, out]`."""


def product(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **options: Any) -> jax.Array:
    """Compute `jax.lax.dot_general`; on one CPU by a kernel of our own where that is faster."""
    numbers = tuple(tuple(tuple(axes) for axes in pair) for pair in dimension_numbers)
    alone = is_on_one_device() and kernels_heed(args[0] if args else options.get("precision"))
    if numbers == MATRICES and lhs.ndim == 2 and alone:
        if native.serves_few_rows(lhs, [rhs]):
            return native.few_rows(lhs, [rhs])[0]
        if native.serves_many_rows(lhs, rhs):
            return native.many_rows(lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)


def kernels_heed(precision: Any) -> bool:
    """Whether our kernels compute as precisely as is asked for: they are for CPUs, where float32 is never cut short."""
    return precision is None or jax.default_backend() == "cpu"


def project(inputs: jax.Array, *layers: Any) -> tuple[jax.Array, ...]:
    """Return what each of some layers makes of the same inputs, `[..., in]` to `[..., out]`.

    Where a few rows are multiplied on one CPU, plain layers are computed in one call of the kernel.
    """
    plain = all(type(layer) is Linear and layer.dot_general is product for layer in layers)
    if plain and is_on_one_device() and all(kernels_heed(layer.precision) for layer in layers):
        operands = [layer.operands(inputs) for layer in layers]
        x, kernels = operands[0][0], [kernel for _, kernel, _ in operands]
        alike = x.ndim == 2 and all(other.dtype == x.dtype for other, _, _ in operands)
        if alike and native.serves_few_rows(x, kernels):
            made = zip(native.few_rows(x, kernels), operands, strict=True)
            return tuple(_completed(y, bias, inputs) for y, (_, _, bias) in made)
    return tuple(layer(inputs) for layer in layers)


class Linear(nnx.Linear):
    """`nnx.Linear` (kernel `[in, out]`) that computes on `[rows, in]`.

    One plain matrix product instead of a batched one is the largest single gain in speed on CPU. Batch and sequence
    stay apart where the mesh splits the sequence: merged, no device would own a contiguous part.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        roles: of the kernel's dimensions in a mesh while it is used (`easydel.sharding.at_use`); `None`: it is left to
            the compiler.
        dot_general: computes the product.
        **options: as in `nnx.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        roles: tuple[str | None, str | None] | None = None,
        dot_general: Any = product,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, dot_general=dot_general, **options)
        self.roles = roles

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map `[..., in]` to `[..., out]`."""
        x, kernel, bias = self.operands(inputs)
        options = {} if self.preferred_element_type is None else {"preferred_element_type": self.preferred_element_type}
        contracted = (((x.ndim - 1,), (0,)), ((), ()))
        return _completed(self.dot_general(x, kernel, contracted, precision=self.precision, **options), bias, inputs)

    def operands(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return what is multiplied, `[rows, in]` and `[in, out]`, and the bias, in the dtype of computation."""
        bias = None if self.bias is None else self.bias.get_value()
        x, kernel, bias = self.promote_dtype((inputs, self.kernel.get_value(), bias), dtype=self.dtype)
        if self.roles is not None:  # in the compute dtype: fewer bytes are gathered
            kernel = at_use(kernel, inputs, *self.roles)
        if inputs.ndim > 2 and not sequence_is_split():
            x = x.reshape(-1, inputs.shape[-1])
        return x, kernel, bias


def _completed(y: jax.Array, bias: jax.Array | None, inputs: jax.Array) -> jax.Array:
    return (y if bias is None else y + bias).reshape(*inputs.shape[:-1], y.shape[-1])


def flat_inputs(inputs: jax.Array, axes: Sequence[int] = (-1,)) -> jax.Array:
    """Return inputs with the axes that a layer contracts, in their order, as one last axis.

    Args:
        inputs: `[..., in]`, or of several axes as `nnx.LinearGeneral` takes them.
        axes: that are contracted.
    """
    contracted = sorted(axis % inputs.ndim for axis in axes)  # nnx.LinearGeneral sorts them, too
    left = [size for axis, size in enumerate(inputs.shape) if axis not in contracted]
    if contracted != list(range(inputs.ndim - len(contracted), inputs.ndim)):
        inputs = jnp.moveaxis(inputs, contracted, range(inputs.ndim - len(contracted), inputs.ndim))
    return inputs if len(contracted) == 1 else inputs.reshape(*left, -1)


Spread = float | jax.nn.initializers.Initializer
"""How new weights are drawn: the deviation of a normal distribution, or an initializer."""


def stddev_of(init_stddev: Spread | Mapping[str, Spread], name: str) -> Spread:
    """Return the deviation of a projection's initial weights, given one for all or one by name."""
    return init_stddev[name] if isinstance(init_stddev, Mapping) else init_stddev


def normal_init(stddev: Spread) -> jax.nn.initializers.Initializer:
    """Return the initializer transformers uses for weights, a normal distribution; one that is given stays."""
    return stddev if callable(stddev) else jax.nn.initializers.normal(stddev, dtype=jnp.float32)


def truncated_init(stddev: float, cutoff: float) -> jax.nn.initializers.Initializer:
    """Return a normal distribution of which nothing beyond `cutoff · stddev` is drawn: its own deviation is less."""
    return jax.nn.initializers.truncated_normal(stddev, dtype=jnp.float32, lower=-cutoff, upper=cutoff)
