"""Folding adapters into the weights of their layers, and taking them out again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.distributed import warn, whole
from easydel.lora.adapters import adapted_layers
from easydel.lora.layer import LoraAdapter, detach, magnitude_ratio
from easydel.lora.saved import exchange
from easydel.lora.weights import scaled_product, weight_matrix, weight_name
from easydel.quantization.apply import quantize_parts
from easydel.quantization.report import remember_errors
from easydel.stacked import layer_paths

# Beside the adapters, not in them: what is folded is a model like any other.
_ORIGINALS: weakref.WeakKeyDictionary[LoraAdapter, dict[str, jax.Array]] = weakref.WeakKeyDictionary()
_REPORTS: weakref.WeakKeyDictionary[nnx.Module, FoldReport] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class FoldReport:
    """What folding adapters into quantized weights added to their error; `str()` says it in a line.

    Attributes:
        method: of quantization.
        errors: path of each layer → Frobenius norm of what quantizing the folded weight anew changed, by the weight's.
    """

    method: str
    errors: dict[str, float]

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer."""
        return max(self.errors.values())

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda path: self.errors[path])
        return (
            f"folding adapters into {len(self.errors)} {self.method!r} layers quantized their weights once more; the "
            f"relative error that added is at most {self.largest_error:.3g} ({worst})"
        )


def fold_report(module: nnx.Module) -> FoldReport | None:
    """Return what the last folding of a module did to quantized weights; `None` if it did nothing to any."""
    return _REPORTS.get(module)


def merge(module: nnx.Module) -> None:
    """Fold adapters into the weights, keeping the weights that were there; see `EasyDeLBaseModule.merge_adapter`."""
    layers = _adapted(module, "merge_adapter")
    if any(layer.lora.merged for layer in layers.values()):
        raise ValueError("the adapters are merged already; unmerge_adapter() takes them out again")
    _fold(module, layers, keep=True)
    for layer in layers.values():
        layer.lora.merged = True


def unmerge(module: nnx.Module) -> None:
    """Put back the weights from before `merge`, bit by bit; see `EasyDeLBaseModule.unmerge_adapter`."""
    layers = _adapted(module, "unmerge_adapter")
    if not all(layer.lora.merged for layer in layers.values()):
        raise ValueError("the adapters are not merged: there is nothing to take out of the weights")
    if lost := [path for path, layer in layers.items() if layer.lora not in _ORIGINALS]:
        raise ValueError(
            f"the weights from before merging are not known here ({lost[0]}): only the very model that was merged "
            "keeps them, no copy of it and no state's model"
        )
    for layer in layers.values():
        originals = _ORIGINALS.pop(layer.lora)
        exchange({name: getattr(layer, name) for name in originals}, originals)
        layer.lora.merged = False


def unwrap(module: nnx.Module) -> None:
    """Fold adapters into the weights and remove them; see `EasyDeLBaseModule.unwrap_lora_to_layers`."""
    layers = _adapted(module, "unwrap_lora_to_layers")
    if not any(layer.lora.merged for layer in layers.values()):
        _fold(module, layers, keep=False)
    for layer in layers.values():
        _ORIGINALS.pop(layer.lora, None)
        detach(layer)


def _adapted(module: nnx.Module, what: str) -> dict[str, Any]:
    layers = adapted_layers(module)
    if not layers:
        raise ValueError(f"{what}: the model has no adapters; apply_lora_to_layers() or load_adapter() gives it some")
    if off := [path for path, layer in layers.items() if not layer.lora.enabled]:
        raise ValueError(f"{what}: the adapters are disabled ({off[0]}); leave disable_adapters() first")
    return layers


def _fold(module: nnx.Module, layers: Mapping[str, Any], *, keep: bool) -> None:
    _check_finite(layers)
    errors: dict[str, float] = {}
    method = ""
    for path, layer in layers.items():
        graphdef, state = nnx.split(layer)
        weight = _folded(graphdef, state)
        if getattr(layer, "is_quantized_layer", False):
            method, parts, found = layer.method, *_requantized(layer, weight)
            errors |= dict(zip(layer_paths(path) or [path], found, strict=True))
        else:
            parts = {weight_name(layer): weight}
        before = exchange({name: getattr(layer, name) for name in parts}, parts)
        if keep:
            _ORIGINALS[layer.lora] = before
    _REPORTS.pop(module, None)
    if errors:
        report = _REPORTS[module] = FoldReport(method, errors)
        warn(f"{report}; model.lora_fold_report has each layer's", stacklevel=4)


def _check_finite(layers: Mapping[str, Any]) -> None:
    arrays: Iterable[jax.Array] = (
        variable.get_value() for layer in layers.values() for variable in layer.lora.variables().values()
    )
    finite = [jnp.isfinite(array).all() for array in arrays]
    if not all(map(bool, finite)):
        raise ValueError("the adapters hold infinite or undefined numbers; folding them would ruin the weights")


@functools.partial(jax.jit, static_argnums=0)
def _folded(graphdef: Any, state: nnx.State) -> jax.Array:
    """Return the weight with the adapter, computed in float32, in the layout and type it is stored in."""
    layer: Any = nnx.merge(graphdef, state)
    weight = weight_matrix(layer) + scaled_product(layer.lora)
    if layer.lora.magnitude is not None:
        weight = weight * magnitude_ratio(layer)[..., None, :]
    if getattr(layer, "is_quantized_layer", False):
        return weight
    held = getattr(layer, weight_name(layer)).get_value()
    return weight.reshape(held.shape).astype(held.dtype)


def _requantized(layer: Any, weight: jax.Array) -> tuple[dict[str, jax.Array], list[float]]:
    """Return codes and scales of a folded weight `[..., in, out]`, and the error of each layer."""
    scale = layer.input_scale.get_value() if layer.how.is_calibrated else None
    kernel = weight.reshape(*weight.shape[: weight.ndim - 2 - layer.experts_axes], *layer.kernel_shape)
    parts, error = quantize_parts(layer, kernel, scale)
    errors = [float(value) for value in whole(error).reshape(-1)]
    remember_errors(layer, errors)
    return parts, errors
