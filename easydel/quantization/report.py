"""What quantizing did to a model: layers, bytes before and after, errors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from easydel.paths import named_modules, natural
from easydel.quantization.layer import QuantizedLayer, QuantizedWeight
from easydel.stacked import layer_paths

if TYPE_CHECKING:
    from rich.table import Table

# Beside the layers, not in them: equal models with other errors must share their compiled programs.
_ERRORS: weakref.WeakKeyDictionary[nnx.Module, list[float]] = weakref.WeakKeyDictionary()


def remember_errors(layer: nnx.Module, errors: list[float]) -> None:
    """Note the relative error of a quantized layer, of a stack that of each layer."""
    _ERRORS[layer] = errors


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        path: of the module.
        shape: of its float kernel.
        bytes_before: of the float kernel, in the dtype it was stored in.
        bytes_after: of codes and scales.
        relative_error: Frobenius norm of the error by that of the kernel; `None` where the float kernel was never
            seen here (a model read from a quantized checkpoint, or a copy of one).
    """

    path: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    relative_error: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """What quantizing did to a model; `str()` says it in a line, `table()` layer by layer.

    Attributes:
        method: name of the method.
        group_size: inputs that share a scale.
        layers: one entry for each quantized layer.
    """

    method: str
    group_size: int
    layers: tuple[LayerReport, ...]

    @property
    def bytes_before(self) -> int:
        """Of the float kernels of all quantized layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of the codes and scales of all quantized layers."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def largest_error(self) -> float | None:
        """The largest relative error of a layer; `None` if none is known."""
        return max((layer.relative_error for layer in self.layers if layer.relative_error is not None), default=None)

    def __str__(self) -> str:
        from easydel.sharding.explain_text import bytes_text

        worst = "" if self.largest_error is None else f"; largest relative error {self.largest_error:.3g}"
        return (
            f"{self.method}, groups of {self.group_size}: {len(self.layers)} layers, {bytes_text(self.bytes_before)} → "
            f"{bytes_text(self.bytes_after)} ({self.bytes_after / self.bytes_before:.3f}){worst}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what `json` can write."""
        content = asdict(self)
        content["layers"] = [layer | {"shape": list(layer["shape"])} for layer in content["layers"]]
        return content | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def table(self) -> Table:
        """Return the layers as a `rich` table."""
        from rich.table import Table

        from easydel.sharding.explain_text import bytes_text

        table = Table(title=str(self), title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("layer", "shape", "before", "after", "error"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for layer in self.layers:
            error = "" if layer.relative_error is None else f"{layer.relative_error:.3g}"
            shape = "×".join(map(str, layer.shape))
            table.add_row(layer.path, shape, bytes_text(layer.bytes_before), bytes_text(layer.bytes_after), error)
        return table


def quantized_layers(module: nnx.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers by path, as they are stored."""
    found = named_modules(module, by_layer=False).items()
    return {path: layer for path, layer in found if isinstance(layer, QuantizedLayer)}


def report_of(module: nnx.Module) -> QuantizationReport | None:
    """Return what is known of a module's quantized layers; `None` if it has none."""
    layers = quantized_layers(module)
    if not layers:
        return None
    first = next(iter(layers.values()))
    entries = [entry for path, layer in layers.items() for entry in _entries(path, layer)]
    entries.sort(key=lambda entry: natural(entry.path))
    return QuantizationReport(first.method, first.group_size, tuple(entries))


def _entries(path: str, layer: QuantizedLayer) -> Iterable[LayerReport]:
    paths = layer_paths(path) or [path]
    before = math.prod(layer.kernel_shape) * jnp.dtype(layer.param_dtype).itemsize
    held = [value.get_value() for value in vars(layer).values() if isinstance(value, QuantizedWeight)]
    after = sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in held) // len(paths)
    errors = _ERRORS.get(layer, [None] * len(paths))
    for name, error in zip(paths, errors, strict=True):
        yield LayerReport(name, layer.kernel_shape, before, after, error)
