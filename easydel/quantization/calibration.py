"""`a8bit`: which inputs a weight should be exact for, from the activations that a model is seen to make."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.calls import takes
from easydel.distributed import warn
from easydel.errors import UnsupportedError
from easydel.layers.moe.experts import ExpertLinear
from easydel.layers.scan import ScannedLayers
from easydel.layers.stack import LayerInputs, LayerStack, StackOutput
from easydel.native.codes import dequantize
from easydel.paths import named_modules
from easydel.quantization.choose import Chosen
from easydel.quantization.formats import quantize
from easydel.quantization.replace import replace_modules
from easydel.stacked import layer_of

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
                f"calibrating {self.path} is not supported, because its layer is traced, as in a scan of your own or "
                "where it is computed again for gradients: quantize with gradient_checkpointing='none'"
            )
        axes = sorted(axis % inputs.ndim for axis in getattr(self.layer, "axis", (-1,)))
        x = jnp.moveaxis(inputs, axes, range(inputs.ndim - len(axes), inputs.ndim))
        features = int(np.prod(x.shape[inputs.ndim - len(axes) :]))
        self.notes.add(np.asarray(x, np.float32).reshape(-1, features))
        return self.layer(inputs, *args, **options)


class _LayerByLayer(nnx.Module):
    """Layers stored stacked, run one after the other with observers, each taken out of the stack only while it runs."""

    def __init__(self, layers: ScannedLayers, path: str, notes: Mapping[str, _Notes]) -> None:
        self.layers, self.path, self.notes = layers, path, nnx.static(dict(notes))

    def __iter__(self) -> Iterator[Any]:
        for place, block in enumerate(self.layers):
            _put_observers(block, f"{self.path}/{place}/" if self.path else f"{place}/", self.notes)
            yield block

    def run(self, hidden: jax.Array, inputs: LayerInputs, caches: Any, remat: str = "none") -> StackOutput:
        """Run all blocks; see `LayerStack.run`. No gradient will be asked for, so nothing is computed again."""
        del remat
        return LayerStack.run(self, hidden, inputs, caches)  # type: ignore[arg-type]


def _put_observers(module: Any, prefix: str, notes: Mapping[str, _Notes]) -> None:
    """Let the layers of a module, at paths behind a prefix, take down their inputs."""
    modules = named_modules(module, by_layer=False)
    there = {path.removeprefix(prefix): seen for path, seen in notes.items() if path.startswith(prefix)}
    observers = {id(modules[p]): _Observed(modules[p], prefix + p, seen) for p, seen in there.items() if p in modules}
    replace_modules(module, observers)


def input_scales(
    module: Any, chosen: Sequence[Chosen], group_size: int, calibration: Sequence[Any] | None
) -> dict[str, jax.Array]:
    """Return path → float32 `[in]` (of a stack `[layers, in]`), by which a weight is multiplied before it is quantized.

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
        scales = []
        for index, path in enumerate(one.paths):
            matrix = kernel if one.stack is None else layer_of(kernel, index)
            scales.append(best_scale(matrix.reshape(len(notes[path].total), -1), notes[path], group_size))
        found[one.path] = scales[0] if one.stack is None else jnp.stack(scales)
    return found


def observe(module: Any, chosen: Sequence[Chosen], batches: Sequence[Mapping[str, Any]]) -> dict[str, _Notes]:
    """Run the model on batches and return what each layer was given by path; the model itself is not touched."""
    notes = {path: _Notes() for one in chosen for path in one.paths}
    copy: Any = nnx.merge(*nnx.split(module))  # new modules, the same arrays
    there = named_modules(copy, by_layer=False).items()
    unstacked = {id(m): _LayerByLayer(m, path, notes) for path, m in there if isinstance(m, ScannedLayers)}
    replace_modules(copy, unstacked)
    _put_observers(copy, "", notes)
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
        warn(
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
