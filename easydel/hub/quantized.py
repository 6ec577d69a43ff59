"""Quantized models and files: what of them is written how, and what a checkpoint says it holds.

Two layouts. Where every quantized layer of a model is `nf4`, a plain `x.weight` in Hugging Face's names, and fits
bitsandbytes' blocks, its tensors are those of `easydel.hub.bitsandbytes`. Else each quantized layer's `codes`, `scales`
(and `input_scale`) are written as they are (`easydel.quantization.formats`), under the layer's plain name: `x.codes`,
`x.scales`, `x.input_scale`; of a tensor that Hugging Face fuses and of which only some parts are quantized, the others
are written by themselves, too. `quantization_config` in `config.json` tells which: its `quant_method` is
`"bitsandbytes"`, or `"easydel"` beside `method` and `group_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub.bitsandbytes import BLOCK_SIZES, PACKED_DTYPES, PACKED_SUFFIXES, PackNF4, unpacked_table
from easydel.hub.safetensors import TensorEntry
from easydel.hub.weight_map import TRANSPOSE, Link, build_links, stored_variables, tied_names
from easydel.quantization.choose import candidates
from easydel.quantization.layer import QuantizedLayer, QuantizedWeight
from easydel.quantization.linear import QuantizedLinear
from easydel.quantization.methods import METHODS
from easydel.quantization.report import quantized_layers
from easydel.stacked import kind_of, layer_of, layer_paths

OURS = "easydel"
PARTS = (".codes", ".scales", ".input_scale")


@dataclass(frozen=True)
class DequantizedKernel:
    """The float kernel of a quantized layer, with the methods of `nnx.Variable` that views need.

    Attributes:
        layer: the quantized layer.
        index: which of a stack's layers; `None`: it is no stack.
    """

    layer: QuantizedLayer
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.layer.kernel_shape

    @property
    def dtype(self) -> Any:
        """The type the kernel was stored in."""
        return self.layer.param_dtype

    def get_value(self) -> jax.Array:
        """Return the values that the codes stand for."""
        kernel = self.layer.dequantized(self.dtype)
        return kernel if self.index is None else layer_of(kernel, self.index)


def float_variables(module: nnx.Module) -> dict[str, Any]:
    """Return `stored_variables`, with dequantized kernels in place of codes and scales."""
    variables: dict[str, Any] = {
        path: variable
        for path, variable in stored_variables(module).items()
        if not issubclass(kind_of(variable), QuantizedWeight)
    }
    for path, layer in quantized_layers(module).items():
        layers = layer_paths(path)
        for index, name in enumerate(layers or [path]):
            key = f"{name}/kernel" if name else "kernel"
            variables[key] = DequantizedKernel(layer, None if layers is None else index)
    return variables


def file_links(module: nnx.Module) -> list[Link]:
    """Return the weight map that saving uses: `build_links`, with NF4 as bitsandbytes has it where that is possible."""
    links = build_links(module)
    packed = packed_links(module)
    if not packed:
        return links
    done = {target for link in packed for target in link.targets}
    return [link for link in links if done.isdisjoint(link.targets)] + packed


def packed_links(module: nnx.Module) -> list[Link]:
    """Return a link for each quantized layer in bitsandbytes' layout; none if any of them does not fit it."""
    layers = quantized_layers(module)
    if not layers or any(not _fits(layer) for layer in layers.values()):
        return []
    floats = {link.targets[0]: link for link in build_links(module, float_variables(module))}
    packed = []
    for path, layer in layers.items():
        for name in layer_paths(path) or [path]:
            prefix = f"{name}/" if name else ""
            link = floats.get(f"{prefix}kernel")
            if link is None or len(link.targets) > 1 or link.transform != TRANSPOSE or not _is_weight(link):
                return []
            packed.append(_packed(link, prefix, layer))
    return packed


def _is_weight(link: Link) -> bool:
    return len(link.sources) == 1 and link.sources[0].endswith(".weight")


def _fits(layer: QuantizedLayer) -> bool:
    return (
        layer.method == "nf4"
        and isinstance(layer, QuantizedLinear)
        and len(layer.kernel_shape) == 2
        and layer.group_size in BLOCK_SIZES
        and layer.features[0] % layer.group_size == 0
    )


def _packed(link: Link, prefix: str, layer: QuantizedLayer) -> Link:
    inputs, outputs = layer.features
    transform = PackNF4((outputs, inputs), layer.group_size, str(np.dtype(layer.param_dtype)))
    shapes = (outputs, inputs // 2), (outputs, inputs // layer.group_size)
    name = link.sources[0].removesuffix(".weight")
    return Link(
        sources=tuple(name + suffix for suffix in PACKED_SUFFIXES),
        targets=(f"{prefix}codes", f"{prefix}scales"),
        transform=transform,
        source_shapes=tuple(transform.source_shapes(shapes)),
        target_shapes=shapes,
        source_dtypes=PACKED_DTYPES,
    )


def rendered_config(module: Any) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model's `config.json`; `None` if it is not quantized."""
    layers = quantized_layers(module)
    if not layers:
        return None
    first = next(iter(layers.values()))
    if not (packed := packed_links(module)):
        return {"quant_method": OURS, "method": first.method, "group_size": first.group_size}
    links = build_links(module, float_variables(module))
    names = {link.targets[0]: link.sources[0].removesuffix(".weight") for link in links}
    kept = {names[f"{path}/kernel"] for one in candidates(module) for path in one.paths}
    kept |= {alias.removesuffix(".weight") for alias in tied_names(module)}
    kept -= {link.sources[0].removesuffix(".weight") for link in packed}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(np.dtype(module.dtype)),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(kept),
    }


@dataclass(frozen=True)
class StoredQuantization:
    """What a checkpoint's tensors are quantized by.

    Attributes:
        method: name of the method.
        group_size: inputs that share a scale.
        table: the tensors, quantized ones as our codes and scales.
    """

    method: str
    group_size: int
    table: Mapping[str, TensorEntry]


def stored_quantization(settings: Any, table: Mapping[str, TensorEntry], where: str) -> StoredQuantization:
    """Return how a checkpoint is quantized.

    Args:
        settings: `quantization_config` of its `config.json`.
        table: its tensors.
        where: the file, for messages.

    Raises:
        UnsupportedError: by a method that is not known here.
        CheckpointError: settings and tensors contradict each other.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: quantization_config should be an object, got {str(settings)[:100]}")
    kind = settings.get("quant_method")
    if kind == OURS:
        method, size = settings.get("method"), settings.get("group_size")
        if method not in METHODS or type(size) is not int or size < 1:
            raise CheckpointError(
                f"{where}: quantization_config says method {method!r} and group_size {size!r}; expected one of "
                f"{', '.join(METHODS)} and a positive integer"
            )
        return StoredQuantization(method, size, table)
    if kind == "bitsandbytes" or settings.get("load_in_4bit"):
        if not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type", "fp4") != "nf4":
            raise UnsupportedError(
                f"{where}: of bitsandbytes only 4-bit NormalFloat (load_in_4bit, bnb_4bit_quant_type 'nf4') is read; "
                "its 8-bit and FP4 weights are not supported: load the float model and quantize it here"
            )
        unpacked, size = unpacked_table(table)
        if size is None:
            raise CheckpointError(f"{where}: says that weights are NF4, but no tensor of the checkpoint is")
        return StoredQuantization("nf4", size, unpacked)
    raise UnsupportedError(
        f"{where}: weights quantized by {kind!r} are not supported; load the float model and quantize it here"
    )


def stored_layers(module: nnx.Module, names: frozenset[str], where: str) -> list[str]:
    """Return the paths of the layers whose codes a checkpoint holds.

    Args:
        module: the model with *all* layers quantized that can be, abstract.
        names: of the checkpoint's tensors, as the module names them.
        where: the file, for messages.

    Raises:
        UnsupportedError: of layers that are to be stored stacked, only some are quantized.
    """
    found = {
        link.targets[0].removesuffix("codes").removesuffix("/")
        for link in build_links(module)
        if len(link.targets) == 1 and link.targets[0].rpartition("/")[2] == "codes" and link.sources[0] in names
    }
    paths = []
    for path in quantized_layers(module):
        layers = layer_paths(path) or [path]
        missing = [layer for layer in layers if layer not in found]
        if missing and len(missing) < len(layers):
            raise UnsupportedError(
                f"{where}: {missing[0]} is not quantized, but other layers of its kind are, which is not supported "
                "with scan_layers=True; load with scan_layers=False"
            )
        if not missing:
            paths.append(path)
    return paths
