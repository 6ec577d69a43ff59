"""Experts whose weights are quantized."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.layers.moe.experts import ExpertLinear
from easydel.layers.moe.mechanisms import grouped_product
from easydel.native.codes import is_packed
from easydel.quantization.expert_products import Product, expert_of_rows, expert_product
from easydel.quantization.layer import Origin, QuantizedLayer


class QuantizedExpertLinear(QuantizedLayer):
    """`easydel.layers.moe.experts.ExpertLinear` with a quantized weight.

    Attributes:
        codes: of the weights `[experts, out, in]`.
        scales: float32 `[experts, out, groups]`.
    """

    experts_axes: ClassVar[int] = 1

    def __init__(self, layer: ExpertLinear, method: str, group_size: int, stack: int | None = None) -> None:
        kernel = layer.kernel.get_value()
        shape = tuple(kernel.shape) if stack is None else tuple(kernel.shape[1:])
        experts, inputs, outputs = shape
        leading = (experts,) if stack is None else (stack, experts)
        super().__init__(layer, Origin(nnx.graphdef(layer), shape), method, group_size, (inputs, outputs), leading)

    def product(self, rows: jax.Array, sizes: jax.Array, *, mechanism: str, precision: Any) -> jax.Array:
        """Multiply each row by its expert's weights; see `ExpertLinear.product`.

        `"auto"` and `"blocks"` read the codes of those experts that have rows; `"grouped"` and `"ragged"` make all
        experts' weights whole first.

        Raises:
            UnsupportedError: activations are to be quantized, and the mechanism multiplies floats.
        """
        integers = self.how.quantizes_activations
        if mechanism not in ("auto", "blocks"):
            if integers:
                raise UnsupportedError(
                    f"moe_mechanism={mechanism!r} multiplies floats, which is not supported with {self.method!r}: use "
                    "'auto' or 'blocks'"
                )
            kernels = self._matrix(self.dtype, rows.shape[-1])
            return grouped_product(rows, sizes, kernels, mechanism=mechanism, precision=precision)
        if self.how.is_calibrated:
            rows = (rows / self.input_scale.get_value()[expert_of_rows(sizes, rows.shape[0])]).astype(rows.dtype)
        how = Product(self.format, self.group_size, integers, mechanism == "blocks", precision)
        return expert_product(rows, self.codes.get_value(), self.scales.get_value(), sizes, how)

    def adds_up(self, parts: int) -> bool:
        """Whether products of parts of the inputs add up to the whole's: no group is cut, no scale of a token is."""
        if parts == 1:
            return True
        each, rest = divmod(self.features[0], parts)
        is_whole = rest == 0 and each % self.group_size == 0 and not (is_packed(self.format) and each % 2)
        return is_whole and not self.how.quantizes_activations
