"""Quantizing while a model is read: abstract modules get quantized layers, tensors are turned into codes one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.quantization.apply import quantize_parts
from easydel.quantization.choose import candidates, chosen_layers
from easydel.quantization.layer import QuantizedLayer
from easydel.quantization.linear import quantized_layer
from easydel.quantization.methods import check_group_size, method_named
from easydel.quantization.replace import replace_modules
from easydel.quantization.report import remember_errors
from easydel.stacked import layer_paths


def install_layers(module: nnx.Module, method: str, group_size: int, paths: Collection[str] | None = None) -> None:
    """Replace layers by quantized ones without numbers, in place.

    Args:
        module: a float module, its arrays abstract.
        method: name of the method.
        group_size: inputs that share a scale.
        paths: of the layers, as they are stored; `None`: all that can be quantized.
    """
    for one in candidates(module):
        if paths is None or one.path in paths:
            replace_modules(module, {id(one.layer): quantized_layer(one.layer, method, group_size, one.stack)})


class LoadQuantizer:
    """Turns float kernels into codes and scales as they are read.

    Args:
        method: name of the method.
        group_size: inputs that share a scale.
        pattern: regular expression on module paths.

    Raises:
        ValueError: an unknown method or group size.
        UnsupportedError: a method that has to see the model run.
    """

    def __init__(self, method: str, group_size: int = 64, pattern: str = ".*") -> None:
        self._method, self._group_size, self._pattern = method_named(method), check_group_size(group_size), pattern
        if self._method.is_calibrated:
            raise UnsupportedError(
                f"{method!r} is not supported kernel by kernel, since it is calibrated on the running float model: "
                "load it, then call quantize()"
            )
        self._places: dict[str, tuple[QuantizedLayer, int]] = {}
        self._errors: dict[QuantizedLayer, dict[int, float]] = {}

    def install(self, module: nnx.Module) -> None:
        """Replace the chosen layers of an abstract module by quantized ones, in place."""
        for one in chosen_layers(module, self._pattern):
            layer = quantized_layer(one.layer, self._method.name, self._group_size, one.stack)
            replace_modules(module, {id(one.layer): layer})
            for index, path in enumerate(layer_paths(one.path) or [one.path]):
                self._places[f"{path}/kernel" if path else "kernel"] = layer, index

    def takes(self, path: str) -> bool:
        """Whether the float parameter at a path (of one layer) becomes codes."""
        return path in self._places

    def parts(self, path: str, kernel: jax.Array) -> dict[str, jax.Array]:
        """Return path → array of what comes in place of a float kernel.

        Raises:
            ValueError: the kernel is not finite.
        """
        layer, index = self._places[path]
        parts, error = quantize_parts(layer, kernel)
        if not bool(jnp.isfinite(parts["scales"]).all()):
            raise ValueError(f"{path} holds infinite or undefined numbers, which no group can be scaled by")
        errors = self._errors.setdefault(layer, {})
        errors[index] = float(jnp.max(error))
        remember_errors(layer, [errors[place] for place in sorted(errors)])
        return {f"{path.removesuffix('kernel')}{name}": array for name, array in parts.items()}


def with_parts(make: Any, **settings: Any) -> Any:
    """Return a function that builds what `make` builds, with quantized layers; settings as of `install_layers`."""

    def build() -> Any:
        module = make()
        install_layers(module, **settings)
        return module

    return build


def load_quantization(
    method: str | None, group_size: int | None, pattern: str | None, calibration: Sequence[Any] | None
) -> tuple[LoadQuantizer | None, Callable[[Any], Any]]:
    """Return how a model is quantized while it is read, and what is done to it once it has been.

    Args:
        method: name of the method; `None`: nothing is quantized.
        group_size: inputs that share a scale, 64 if `None`.
        pattern: regular expression on module paths, all layers if `None`.
        calibration: batches, for a method that has to see the model run, which is then quantized afterwards.

    Raises:
        ValueError: settings without a method, calibration that the method does not read, an unknown method or size.
    """
    if method is None:
        if group_size is not None or pattern is not None or calibration is not None:
            raise ValueError(
                "quantization_group_size, quantization_pattern and quantization_calibration need a "
                "quantization_method, such as nf4"
            )
        return None, lambda model: model
    settings = method, 64 if group_size is None else group_size, ".*" if pattern is None else pattern
    if not method_named(method).is_calibrated:
        if calibration is not None:
            raise ValueError(f"quantization_calibration is read by 'a8bit' only, not by {method!r}; leave it out")
        return LoadQuantizer(*settings), lambda model: model
    check_group_size(settings[1])
    return None, lambda model: model.quantize(*settings, calibration=calibration)
