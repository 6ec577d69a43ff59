"""The same model twice: transformers' own and ours, with the same random weights, by way of a saved checkpoint."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import easydel
from tests.models.inputs import as_torch, continuing, given, labels
from tests.models.measure import record
from tests.models.table import FAMILIES, Family, Variant

torch.set_num_threads(1)


def close(got: Any, want: Any, tolerance: float, what: str = "", least: float = 1e-30) -> None:
    """Assert equality relative to the largest number: max |got - want| ≤ tolerance · max(max |want|, least)."""
    got, want = array(got), array(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    error = np.abs(got - want).max() / max(np.abs(want).max(), least)
    record(what, error, tolerance)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def equal(got: Any, want: Any, what: str = "") -> None:
    """Assert that all numbers are the same; of two tensors, that their types are, too."""
    if isinstance(got, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda message: f"{what}: {message}")
    else:
        np.testing.assert_array_equal(got, want, err_msg=what)
    record(what, 0.0, 0.0)


CACHES = ("past_key_values", "cache_params", "cache")  # as different versions of transformers call it
NAMES = {"aux_loss": "auxiliary_loss"}  # theirs → ours, where they differ


def same_outputs(got: Any, want: Any, tolerance: float) -> list[str]:
    """Compare everything that transformers' output holds, caches aside; return our names."""
    names = [name for name in want if name not in CACHES and want[name] != ()]
    for name in names:
        one, other = got[NAMES.get(name, name)], want[name]
        if isinstance(other, tuple):
            assert len(one) == len(other), name
            for layer, (ours, theirs) in enumerate(zip(one, other, strict=True)):
                if name == "router_logits":  # theirs have batch and sequence in one
                    theirs = theirs.reshape(ours.shape)
                close(ours, theirs, tolerance, f"{name}[{layer}]")
        else:
            close(one, other, tolerance, name)
    return [NAMES.get(name, name) for name in names]


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
        def step(params: Any, inputs: Any, static: tuple) -> Any:
            def loss(params: Any) -> Any:
                out = pure(params, {**inputs, **dict(static)})
                return out.loss, out

            gradients, out = jax.grad(loss, has_aux=True)(params)
            return out, gradients

        self._run, self._step = run, step

    def __call__(self, **inputs: Any) -> Any:
        return self._run(self.params, *self._split(inputs))

    def gradient(self, **inputs: Any) -> tuple[Any, Any]:
        """Return the loss and the gradients of all parameters."""
        out, gradients = self.step(**inputs)
        return out.loss, gradients

    def step(self, **inputs: Any) -> tuple[Any, Any]:
        """Return all outputs and the gradients, of one program."""
        return self._step(self.params, *self._split(inputs))

    def _split(self, inputs: dict[str, Any]) -> tuple[Any, tuple]:
        static = tuple((k, v) for k, v in inputs.items() if k in self._static)
        return {k: v for k, v in inputs.items() if k not in self._static}, static


@dataclass(frozen=True)
class Pair:
    """Both models of one variant, and the directory they were loaded from."""

    family: Family
    variant: Variant
    task: str
    folder: Path
    hf: Any
    ours: Any
    run: Jitted

    def theirs(self, **inputs: Any) -> Any:
        """Run transformers' model, from a fresh copy: some rope types remember how long a sequence they have seen."""
        if self.family.counts_padding and "attention_mask" in inputs and "position_ids" not in inputs:
            running = np.cumsum(np.asarray(inputs["attention_mask"]), axis=1)
            inputs["position_ids"] = np.maximum(running - 1, 0).astype(np.int32)
        with torch.no_grad():
            return copy.deepcopy(self.hf)(**as_torch(inputs))

    def ids(self, batch: int, length: int, seed: int = 0) -> np.ndarray:
        low = 4  # leaves tokens that stand for padding and ends
        return np.random.default_rng(seed).integers(low, self.hf.config.vocab_size, (batch, length)).astype(np.int32)

    def rows(self, lengths: tuple[int, ...]) -> list[np.ndarray]:
        return [self.ids(1, length, seed=length)[0] for length in lengths]

    def inputs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
        """Return what the forward pass of this task takes."""
        return given(self.task, ids, mask)

    def continuing(self, ids: np.ndarray, mask: Any = None, *, first: bool = True) -> dict[str, Any]:
        """Return what a forward pass takes that adds tokens to a cache; without one, `first` is all there is."""
        return continuing(self.task, ids, mask, first=first)

    def prompt_width(self, ids: np.ndarray) -> int:
        """Return the columns of generated sequences that are the prompt: with an encoder, the start token."""
        return 1 if self.task == "seq2seq" else ids.shape[1]

    def labelled(self, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
        """Return the inputs and labels for them."""
        everywhere = np.ones_like(ids) if mask is None else mask
        return self.inputs(ids, mask) | labels(self.task, ids, everywhere, self.hf.config.num_labels)


def randomise(model: torch.nn.Module, seed: int = 0, factors: Mapping[str, float] | None = None) -> None:
    """Give all that is stored numbers that matter, norms and biases included; `factors`: of the family's entry."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    stored = model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            noise *= math.prod(factor for end, factor in (factors or {}).items() if name.endswith(end))
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.3 * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_((1.0 if name in norms else 0.0) + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def build_hf(family: Family, task: str, config: dict[str, Any], seed: int = 0, attention: str = "eager") -> Any:
    cls = getattr(transformers, family.class_name(task, "theirs"))
    model = cls._from_config(cls.config_class(**copy.deepcopy(config)), attn_implementation=attention)
    randomise(model, seed, family.factors)
    return model.eval()


def write(model: Any, folder: Path, legacy: Any = None, **options: Any) -> None:
    model.save_pretrained(folder, **options)
    if legacy is not None:
        file = folder / "config.json"
        content = json.loads(file.read_text())
        content.pop("rope_parameters")
        file.write_text(json.dumps(content | dict(legacy)))


def load_hf(family: Family, task: str, folder: Path, **options: Any) -> Any:
    cls = getattr(transformers, family.class_name(task, "theirs"))
    return cls.from_pretrained(folder, attn_implementation="eager", **options).eval()


def load_ours(family: Family, task: str, folder: Path, **options: Any) -> Any:
    return getattr(easydel, family.class_name(task, "ours")).from_pretrained(folder, **options)


@functools.cache
def workplace() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="parity-")


def pair(family: str, variant: str, task: str = "", **fields: Any) -> Pair:
    """Return both models of a variant, built once per process.

    Args:
        family: its name in the table.
        variant: its name in the family.
        task: which of the family's classes; its main task's by default.
        **fields: further fields of the config.
    """
    return _pair(family, variant, task or FAMILIES[family].main_task, json.dumps(fields, sort_keys=True))


@functools.cache
def _pair(family: str, variant: str, task: str, fields: str) -> Pair:
    entry = FAMILIES[family]
    row = entry.variant(variant)
    folder = Path(tempfile.mkdtemp(dir=workplace().name))
    hf = build_hf(entry, task, {**entry.config, **row.config, **json.loads(fields)}, attention=row.attention)
    write(hf, folder, row.legacy)
    if row.legacy is not None:
        hf = load_hf(entry, task, folder)
    ours = load_ours(entry, task, folder)
    return Pair(entry, row, task, folder, hf, ours, Jitted(ours))
