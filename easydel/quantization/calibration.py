"""`a8bit`: which inputs a weight should be exact for, from the activations that a model is seen to make."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.calls import takes
from easydel.errors import UnsupportedError
from easydel.layers.moe.experts import ExpertLinear
from easydel.native.codes import dequantize
from easydel.paths import named_modules
from easydel.quantization.choose import Chosen
from easydel.quantization.formats import quantize
from easydel.quantization.replace import replace_modules

MOST_ROWS = 512
"""Of each layer's inputs so many tokens are kept to compare candidates by."""

EXPONENTS = tuple(step / 20 for step in range(21))


class _Notes:
    """What a layer was given: the sum of magnitudes by input, and the first rows."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.rows: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        self.count += x.shape[0]
        self.total = self.total + np.abs(x).sum(axis=0, dtype=np.float64)
        if (missing := MOST_ROWS - sum(map(len, self.rows))) > 0:
            self.rows.append(x[:missing])


class _Observed(nnx.Module):
    """A layer that takes down its inputs."""

    def __init__(self, layer: Any, path: str, notes: _Notes) -> None:
        self.layer, self.path, self.notes = layer, path, notes

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        if isinstance(inputs, jax.core.Tracer):
            raise UnsupportedError(
                f"calibrating {self.path} is not supported, because its layer runs inside a scan or is computed again "
                "for gradients: quantize with config.scan_layers=False and gradient_checkpointing='none'"
            )
        axes = sorted(axis % inputs.ndim for axis in getattr(self.layer, "axis", (-1,)))
        x = jnp.moveaxis(inputs, axes, range(inputs.ndim - len(axes), inputs.ndim))
        features = int(np.prod(x.shape[inputs.ndim - len(axes) :]))
        self.notes.add(np.asarray(x, np.float32).reshape(-1, features))
        return self.layer(inputs, *args, **options)


def input_scales(
    module: Any, chosen: Sequence[Chosen], group_size: int, calibration: Sequence[Any] | None
) -> dict[str, jax.Array]:
    """Return path → float32 `[in]`, by which a layer's weight is to be multiplied before it is quantized.

    As in AWQ (arXiv:2306.00978, section 3.2) the factor of an input is a power of its mean magnitude, `m ** a`, and of
    the exponents `a` in 0, 0.05 … 1 each layer gets the one for which its outputs for the observed inputs change least;
    `a = 0` is plain `8bit`. Experts, whose inputs depend on the router, get no factors.

    Args:
        module: the float model; it is not changed.
        chosen: layers to quantize.
        group_size: inputs that share a scale.
        calibration: batches, each an array of token ids `[batch, seq]` or a mapping of forward arguments; `None`: a
            few random tokens, with a warning.

    Raises:
        ValueError: there are no batches, or a layer was given nothing.
        UnsupportedError: a layer is traced, so that its inputs cannot be seen.
    """
    batches = _batches(module, calibration)
    linear = [one for one in chosen if not isinstance(one.layer, ExpertLinear)]
    notes = observe(module, linear, batches)
    if silent := [path for path, seen in notes.items() if seen.count == 0]:
        raise ValueError(
            f"the calibration batches never reached {', '.join(silent[:5])}; give batches that use these layers, or "
            "leave them out by the quantization_pattern"
        )
    found = {}
    for one in linear:
        kernel = one.layer.kernel.get_value()
        seen = notes[one.path]
        found[one.path] = best_scale(kernel.reshape(len(seen.total), -1), seen, group_size)
    return found


def observe(module: Any, chosen: Sequence[Chosen], batches: Sequence[Mapping[str, Any]]) -> dict[str, _Notes]:
    """Run the model on batches and return what each layer was given; the model itself is not touched."""
    if stacked := [one.path for one in chosen if one.stack is not None]:
        raise UnsupportedError(
            f"'a8bit' is not supported with layers stored stacked ({stacked[0]}): quantize a model built with "
            "scan_layers=False"
        )
    notes = {one.path: _Notes() for one in chosen}
    copy: Any = nnx.merge(*nnx.split(module))  # new modules, the same arrays
    modules = named_modules(copy, by_layer=False)
    observers = {id(modules[path]): _Observed(modules[path], path, seen) for path, seen in notes.items()}
    replace_modules(copy, observers)
    copy.eval()
    for batch in batches:
        copy(**batch)
    return notes


def _batches(module: Any, calibration: Sequence[Any] | None) -> list[dict[str, Any]]:
    if calibration is None:
        size = getattr(module.config, "vocab_size", None)
        if not isinstance(size, int) or not takes(module, "input_ids"):
            raise ValueError(
                f"{type(module).__name__} takes no token ids that could be made up: give calibration= batches of its "
                "forward arguments"
            )
        warnings.warn(
            "'a8bit' is calibrated on a few random tokens, which are no text: give calibration= batches of token ids "
            "that the model is meant for",
            stacklevel=5,
        )
        calibration = [np.random.default_rng(0).integers(0, size, (4, 32))]
    if isinstance(calibration, Mapping | str) or not isinstance(calibration, Sequence) or not len(calibration):
        raise ValueError(
            f"calibration: expected a list of batches (token ids [batch, seq], or mappings of forward arguments), got "
            f"{type(calibration).__name__ if calibration else 'none'}"
        )
    named = [dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch} for batch in calibration]
    return [module.prepare_inputs_for_call(**batch) for batch in named]


def best_scale(matrix: jax.Array, seen: _Notes, group_size: int) -> jax.Array:
    """Return the input scale `[in]` of a kernel `[in, out]` whose outputs for the rows seen change least."""
    mean = np.maximum(seen.total / seen.count, 1e-8)
    mean = np.clip(mean / np.exp(np.log(mean).mean()), 1e-4, 1e4)  # a common factor has no effect
    rows = jnp.asarray(np.concatenate(seen.rows))
    tried = [jnp.asarray(mean**exponent, jnp.float32) for exponent in EXPONENTS]
    errors = [float(_output_error(matrix, scale, rows, group_size)) for scale in tried]
    return tried[int(np.argmin(errors))]


@functools.partial(jax.jit, static_argnums=3)
def _output_error(matrix: jax.Array, scale: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    weight = matrix.astype(jnp.float32).T
    codes, scales = quantize(weight * scale, "int8", group_size)
    back = dequantize(codes, scales, kind="int8", group_size=group_size, inputs=weight.shape[1]) / scale
    return jnp.sum((rows @ (back - weight).T) ** 2)
