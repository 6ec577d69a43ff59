"""Linear layers whose weights are quantized."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.errors import UnsupportedError
from easydel.layers.linear import Linear, flat_inputs
from easydel.layers.moe.experts import ExpertLinear
from easydel.quantization.experts import QuantizedExpertLinear
from easydel.quantization.layer import Origin, QuantizedLayer
from easydel.quantization.products import integer_product, quantized_product
from easydel.sharding import at_use, sequence_is_split


class QuantizedLinear(QuantizedLayer):
    """`easydel.layers.linear.Linear`, `nnx.Linear` or `nnx.LinearGeneral` with a quantized weight.

    Attributes:
        in_features: as of the layer it was, and so `out_features`, `axis` (of `nnx.LinearGeneral`), `use_bias`, `roles`
            (of the float kernel's dimensions), `dtype`, `param_dtype` and `precision`.
        bias: a parameter, or `None`.
        codes: of the weight `[out, in]`, see `easydel.quantization.formats`.
        scales: float32 `[out, groups]`.
        input_scale: float32 `[in]`, only with `a8bit`: inputs are divided by it, the weight was multiplied.
    """

    def __init__(self, layer: Any, method: str, group_size: int, stack: int | None = None) -> None:
        kernel = layer.kernel.get_value()
        shape = tuple(kernel.shape) if stack is None else tuple(kernel.shape[1:])
        self.in_features, self.out_features = layer.in_features, layer.out_features
        features = (_count(layer.in_features), _count(layer.out_features))
        leading = () if stack is None else (stack,)
        super().__init__(layer, Origin(nnx.graphdef(layer), shape), method, group_size, features, leading)
        self.axis = getattr(layer, "axis", (-1,))
        self.use_bias, self.precision = layer.use_bias, layer.precision
        self.roles = getattr(layer, "roles", None)
        self.bias = nnx.data(layer.bias)

    @property
    def _input_axes(self) -> int:
        return len(self.in_features) if isinstance(self.in_features, tuple) else 1

    @property
    def inferred_spec(self) -> PartitionSpec:
        """How the kernel is split where a module has no rules."""
        return PartitionSpec(*(None,) * (len(self.kernel_shape) - 2), "fsdp", "tp")

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        """Map `[..., in]` to `[..., out]`."""
        if out_sharding is not None:
            raise UnsupportedError("out_sharding is not supported by quantized layers; leave it out")
        bias = None if self.bias is None else self.bias.get_value()
        x = inputs.astype(self.dtype or jnp.result_type(inputs, self.param_dtype))
        x = flat_inputs(x, self.axis)
        left = x.shape[:-1]
        if x.ndim != 2 and not sequence_is_split():
            x = x.reshape(-1, self.features[0])
        y = self._product(x, inputs)
        outputs = self.out_features if isinstance(self.out_features, tuple) else (self.out_features,)
        y = y.reshape(*left, *outputs)
        return y if bias is None else y + bias.astype(y.dtype)

    def _product(self, x: jax.Array, inputs: jax.Array) -> jax.Array:
        codes, scales = self.codes.get_value(), self.scales.get_value()
        if self.roles is not None:  # as small as they will ever be: what is gathered is the codes
            codes = at_use(codes, inputs, *reversed(self.roles))
            scales = at_use(scales, inputs, *reversed(self.roles))
        options: dict[str, Any] = {"format": self.format, "group_size": self.group_size}
        if self.how.quantizes_activations:
            return integer_product(x, codes, scales, **options)
        if self.how.is_calibrated:
            x = (x / self.input_scale.get_value()).astype(x.dtype)
        return quantized_product(x, codes, scales, precision=self.precision, **options)


def _count(features: int | tuple[int, ...]) -> int:
    return math.prod(features) if isinstance(features, tuple) else features


def is_quantizable(layer: Any) -> bool:
    """Whether a layer is one of those that can be quantized; classes with a forward pass of their own are not."""
    if type(layer) is ExpertLinear:
        return True
    kinds = (Linear, nnx.Linear, nnx.LinearGeneral)
    return isinstance(layer, kinds) and any(type(layer).__call__ is kind.__call__ for kind in kinds)


def quantized_layer(layer: Any, method: str, group_size: int, stack: int | None = None) -> QuantizedLayer:
    """Return the quantized layer in place of `layer`, its codes and scales still without numbers.

    Args:
        layer: see `is_quantizable`.
        method: name of the method.
        group_size: inputs that share a scale.
        stack: of how many layers it holds the parameters; `None`: one layer.
    """
    kind: Any = QuantizedExpertLinear if isinstance(layer, ExpertLinear) else QuantizedLinear
    return kind(layer, method, group_size, stack)
