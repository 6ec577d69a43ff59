"""The same model twice: transformers' own and ours, with the same random weights, by way of a saved checkpoint."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import easydel
from tests.models.table import FAMILIES, Family, Variant

torch.set_num_threads(1)


def close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    """Assert equality relative to the largest number: max |got - want| ≤ tolerance · max |want|."""
    got, want = array(got), array(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, dtype=np.float64)


class Jitted:
    """Runs a model compiled: `run(input_ids=…)`; arguments that `get_static_arguments` names are static."""

    def __init__(self, model: Any) -> None:
        self.model, self.params = model, model.params
        self._static = set(model.get_static_arguments())
        pure = model.pure_transform_fn()

        @functools.partial(jax.jit, static_argnums=2)
        def run(params: Any, inputs: Any, static: tuple) -> Any:
            return pure(params, {**inputs, **dict(static)})

        @functools.partial(jax.jit, static_argnums=2)
        def gradient(params: Any, inputs: Any, static: tuple) -> Any:
            return jax.value_and_grad(lambda p: pure(p, {**inputs, **dict(static)}).loss)(params)

        self._run, self._gradient = run, gradient

    def __call__(self, **inputs: Any) -> Any:
        return self._run(self.params, *self._split(inputs))

    def gradient(self, **inputs: Any) -> tuple[Any, Any]:
        """Return the loss and the gradients of all parameters."""
        return self._gradient(self.params, *self._split(inputs))

    def _split(self, inputs: dict[str, Any]) -> tuple[Any, tuple]:
        static = tuple((k, v) for k, v in inputs.items() if k in self._static)
        return {k: v for k, v in inputs.items() if k not in self._static}, static


@dataclass(frozen=True)
class Pair:
    """Both models of one variant, and the directory they were loaded from."""

    family: Family
    variant: Variant
    folder: Path
    hf: Any
    ours: Any
    run: Jitted

    def theirs(self, **inputs: Any) -> Any:
        """Run transformers' model, from a fresh copy: some rope types remember how long a sequence they have seen."""
        with torch.no_grad():
            return copy.deepcopy(self.hf)(**as_torch(inputs))

    def ids(self, batch: int, length: int, seed: int = 0) -> np.ndarray:
        low = 4  # leaves tokens that stand for padding and ends
        return np.random.default_rng(seed).integers(low, self.hf.config.vocab_size, (batch, length)).astype(np.int32)


def as_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        tensor = torch.from_numpy(np.array(value))
        return tensor if tensor.is_floating_point() else tensor.long()

    return {k: convert(v) if isinstance(v, np.ndarray | jax.Array) else v for k, v in inputs.items()}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter numbers that matter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.3 * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_((1.0 if name.endswith("norm.weight") else 0.0) + 0.3 * noise)


def build_hf(family: Family, task: str, config: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, family.theirs[task])
    model = cls._from_config(cls.config_class(**copy.deepcopy(config)), attn_implementation="eager")
    randomise(model, seed)
    return model.eval()


def write(model: Any, folder: Path, legacy: Any = None, **options: Any) -> None:
    model.save_pretrained(folder, **options)
    if legacy is not None:
        file = folder / "config.json"
        content = json.loads(file.read_text())
        content.pop("rope_parameters")
        file.write_text(json.dumps(content | dict(legacy)))


def load_hf(family: Family, task: str, folder: Path, **options: Any) -> Any:
    cls = getattr(transformers, family.theirs[task])
    return cls.from_pretrained(folder, attn_implementation="eager", **options).eval()


def load_ours(family: Family, task: str, folder: Path, **options: Any) -> Any:
    return getattr(easydel, family.ours[task]).from_pretrained(folder, **options)


@functools.cache
def workplace() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="parity-")


@functools.cache
def pair(family: str, variant: str, task: str = "causal-lm", fields: str = "{}") -> Pair:
    """Return both models of a variant, built once per process.

    Args:
        family: its name in the table.
        variant: its name in the family.
        task: which of the family's classes.
        fields: further fields of the config, as JSON.
    """
    entry = FAMILIES[family]
    row = entry.variant(variant)
    config = {**entry.config, **row.config, **json.loads(fields)}
    folder = Path(tempfile.mkdtemp(dir=workplace().name))
    hf = build_hf(entry, task, config)
    write(hf, folder, row.legacy)
    if row.legacy is not None:
        hf = load_hf(entry, task, folder)
    ours = load_ours(entry, task, folder)
    return Pair(entry, row, folder, hf, ours, Jitted(ours))


def pad(rows: list[np.ndarray], width: int, *, left: bool, token: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask, `[batch, width]`, of rows of different lengths."""
    ids, mask = np.full((len(rows), width), token, np.int32), np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def int32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)
