"""What layers with quantized weights have in common: codes and scales in place of a kernel, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.native.codes import Kind
from easydel.paths import to_state
from easydel.quantization.formats import code_dtype, code_shape, dequantize_kernel, group_count
from easydel.quantization.methods import METHODS, Method


class QuantizedWeight(nnx.Variable):
    """Codes or scales of a quantized weight: state that files must hold, but no parameter, so nothing to train."""

    must_load = True


@dataclass(frozen=True)
class Origin:
    """What a layer was before, without its numbers: enough to make it again.

    Attributes:
        graphdef: of the layer.
        kernel_shape: of its kernel; of a layer in a stack, that of each.
    """

    graphdef: Any
    kernel_shape: tuple[int, ...]


class QuantizedLayer(nnx.Module):
    """A layer with `codes`, `scales` and, where inputs are scaled, `input_scale`, in place of a kernel.

    Args:
        like: the layer that it was; its dtypes are taken over.
        origin: of it.
        method: name of the quantization method.
        group_size: inputs that share a scale.
        features: how many inputs and outputs the weight has, all axes of each counted together.
        leading: axes of the codes before the weight's own: of layers stored stacked, of experts.
    """

    codes: QuantizedWeight
    scales: QuantizedWeight
    input_scale: QuantizedWeight

    is_quantized_layer: ClassVar[bool] = True
    experts_axes: ClassVar[int] = 0

    def __init__(
        self,
        like: Any,
        origin: Origin,
        method: str,
        group_size: int,
        features: tuple[int, int],
        leading: tuple[int, ...],
    ) -> None:
        self.origin, self.method, self.group_size = origin, method, group_size
        self.kernel_shape = origin.kernel_shape
        self.features = features
        self.dtype, self.param_dtype = like.dtype, like.param_dtype
        # Traced, a module must hold arrays; else shapes will do until the numbers come.
        empty = jnp.zeros if isinstance(like.kernel.get_value(), jax.core.Tracer) else jax.ShapeDtypeStruct
        for name, (shape, dtype) in self.weight_shapes(leading).items():
            setattr(self, name, QuantizedWeight(empty(shape, dtype)))

    def weight_shapes(self, leading: tuple[int, ...] = ()) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return name → (shape, dtype) of what is in place of the kernel, behind the `leading` axes."""
        inputs, outputs = self.features
        codes = code_shape(outputs, inputs, self.format)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "codes": ((*leading, *codes), code_dtype(self.format)),
            "scales": ((*leading, outputs, group_count(inputs, self.group_size)), jnp.float32),
        }
        if self.how.is_calibrated:
            shapes["input_scale"] = ((*leading, inputs), jnp.float32)
        return shapes

    def weight_variables(self) -> dict[str, QuantizedWeight]:
        """Return what is in place of the kernel by name."""
        return {name: getattr(self, name) for name in self.weight_shapes()}

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def format(self) -> Kind:
        """Of the codes."""
        return self.how.format

    def dequantized(self, dtype: Any = jnp.float32) -> jax.Array:
        """Return the kernel that the codes stand for, in the layout it had (behind a stack's axis of layers)."""
        kernel = self._matrix(dtype)
        return kernel.reshape(*kernel.shape[: kernel.ndim - 2 - self.experts_axes], *self.kernel_shape)

    def as_matrix(self, kernel: Any) -> Any:
        """Return a float kernel as `[..., in, out]`, its inputs and outputs each on one axis."""
        leading = kernel.ndim - len(self.kernel_shape) + self.experts_axes
        return kernel.reshape(*kernel.shape[:leading], *self.features)

    def _matrix(self, dtype: Any, inputs: int | None = None) -> jax.Array:
        """Return the kernel `[..., in, out]`, its inputs (if it is a part, so many) and outputs each on one axis."""
        options: dict[str, Any] = {"group_size": self.group_size, "in_features": inputs or self.features[0]}
        codes, scales = self.codes.get_value(), self.scales.get_value()
        factor = self.input_scale.get_value() if self.how.is_calibrated else None
        first = dtype if factor is None else jnp.float32
        kernel = dequantize_kernel(codes, scales, format=self.format, dtype=jnp.dtype(first), **options)
        return kernel if factor is None else (kernel / factor[..., None]).astype(dtype)

    def restored(self) -> nnx.Module:
        """Return the float layer again, with the numbers the codes stand for."""
        kernel = self.dequantized(self.param_dtype)
        arrays = {"kernel": kernel}
        bias = getattr(self, "bias", None)
        if bias is not None:
            arrays["bias"] = bias.get_value()
        layer = nnx.merge(self.origin.graphdef, to_state(arrays), copy=True)
        layer.dtype, layer.param_dtype = self.dtype, self.param_dtype
        if bias is not None:
            layer.bias = bias
        return layer

    def spec_of(self, name: str, kernel_spec: PartitionSpec) -> PartitionSpec:
        """Return how a variable is split where the float kernel (of one layer) would be as `kernel_spec` says.

        Codes and scales stand transposed; of axes that are flattened into one, the mesh axes are joined.
        """
        entries = [*kernel_spec, *[None] * (len(self.kernel_shape) - len(kernel_spec))]
        experts, rest = entries[: self.experts_axes], entries[self.experts_axes :]
        inputs = self._input_axes
        into, out = joined_axes(rest[:inputs]), joined_axes(rest[inputs:])
        return PartitionSpec(*experts, into) if name == "input_scale" else PartitionSpec(*experts, out, into)

    def kernel_spec(self, codes_spec: PartitionSpec) -> PartitionSpec:
        """Return how the float kernel would be split where the codes (of one layer) are as `codes_spec` says."""
        entries = [*codes_spec, *[None] * (self.experts_axes + 2 - len(codes_spec))]
        *experts, out, into = entries
        rest: list[Any] = [None] * (len(self.kernel_shape) - self.experts_axes)
        rest[0], rest[self._input_axes] = into, out
        return PartitionSpec(*experts, *rest)

    @property
    def _input_axes(self) -> int:
        return 1


def joined_axes(entries: Sequence[Any]) -> Any:
    """Return the mesh axes of dimensions that are flattened into one."""
    axes = tuple(axis for entry in entries if entry for axis in (entry if isinstance(entry, tuple) else (entry,)))
    return None if not axes else axes[0] if len(axes) == 1 else axes
