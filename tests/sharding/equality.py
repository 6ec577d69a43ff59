"""The same model on one device and on a mesh, and how far apart the two compute."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from easydel.paths import flatten, named_variables
from easydel.stacked import layer_paths
from tests.sharding.held import family, mesh_named, zeros

TOLERANCE = 1e-5
"""Of float32, whose sums over devices are taken in another order: roundings of 6e-8, some hundred after another."""

SMALL = 1e-2
"""A gradient is compared with its own largest number, but with no less than this part of the model's largest.

Small ones are what is left of large numbers that cancel, and round as those do. The gradient of a key's bias is zero in
exact arithmetic where keys are not rotated (softmax does not see what is added to all of a query's products), those of
BERT's queries and keys are a four hundredth of its largest, and came out 3e-5 apart. What passes is still no more than
1e-7 of the largest: a rounding or two.
"""

BATCH, LENGTH, PROMPT, NEW = 8, 16, 5, 8
SGD = optax.sgd(0.1)


@dataclass(frozen=True)
class Results:
    """What a model computes: numbers by name, and the tokens it writes (`None`: it writes none)."""

    logits: np.ndarray
    loss: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    tokens: np.ndarray | None
    left: tuple[Any, Any]  # gradients and parameters after the step, where the step left them


@jax.jit
def train_step(state: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return logits, loss, gradients and the state after one step, of one compiled program."""

    def loss_of(params: Any) -> tuple[Any, Any]:
        outputs = replace(state, params=params).model(**inputs)
        return outputs.loss, outputs.logits

    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return logits, loss, gradients, state.apply_gradients(gradients)


def results(model: Any, inputs: Mapping[str, Any]) -> Results:
    """Compute everything that is compared."""
    logits, loss, gradients, state = train_step(model.to_state(SGD), dict(inputs))
    tokens = None
    if getattr(model, "can_generate", True):
        tokens = np.asarray(model.generate(inputs["input_ids"][:2, :PROMPT], max_new_tokens=NEW).sequences)
    trees = ({path: np.asarray(leaf) for path, leaf in flatten(tree).items()} for tree in (gradients, state.params))
    return Results(np.asarray(logits), np.asarray(loss), *trees, tokens, (gradients, state.params))


def inputs_of(config: Any, *, mask: bool = True) -> dict[str, np.ndarray]:
    """Return ids, a mask under which two rows are shorter, and labels of which a fifth does not count."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    kept = np.ones_like(ids)
    kept[1, 11:] = kept[6, 5:] = 0
    counted = (kept == 1) & (rng.random(ids.shape) < 0.8)
    labels = np.where(counted, ids, -100).astype(np.int32)
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": kept} if mask else {})


def numbers(model: nnx.Module, small_queries: bool) -> dict[str, np.ndarray]:
    """Return path → numbers that matter for every parameter of a fresh model, norms and biases included."""
    rng = np.random.default_rng(0)
    made = {}
    for path, variable in named_variables(model, nnx.Param).items():
        value = np.asarray(variable.get_value())
        noise = rng.standard_normal(value.shape).astype(np.float32)
        if small_queries and path.endswith("q_proj/kernel"):
            noise *= 0.35  # T5 does not scale its products: softmax would be a mere argmax
        made[path] = noise * value.shape[-2] ** -0.5 if value.ndim > 1 else value + 0.3 * noise
    return made


@dataclass(frozen=True)
class Subject:
    """A model that can be built anew on any mesh, and what it computes on one device."""

    fresh: Callable[[], Any]
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]

    @functools.cached_property
    def alone(self) -> Results:
        return results(self.build(), self.inputs)

    def build(self, mesh: Any = None) -> Any:
        """Return the model on one device, or sharded by its rules; what is dropped is not warned of."""
        model = self.fresh()
        for path, variable in named_variables(model, nnx.Param, by_layer=False).items():
            layers = layer_paths(path)
            value = np.stack([self.params[layer] for layer in layers]) if layers else self.params[path]
            variable.set_value(jax.device_put(value))
        if mesh is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"\d+ mesh axis\(es\) dropped")
                model.shard_model(mesh=mesh)
        return model


@functools.cache
def subject(name: str, *, scan: bool = False, layers: int | None = None) -> Subject:
    """Return a family of the table, its layers stored one by one or stacked; `layers` of them (a decoder's too)."""
    cls, config = family(name)
    for count in ("num_hidden_layers", "num_decoder_layers"):
        if layers and getattr(config, count, None):
            setattr(config, count, layers)
    params = numbers(cls(config, rngs=nnx.Rngs(0)), small_queries=name == "t5")
    chosen = cls.config_class(**{**config.to_dict(), "scan_layers": scan})
    return Subject(lambda: zeros(cls, chosen), params, inputs_of(config))


def errors(got: Results, want: Results) -> dict[str, float]:
    """Return the largest relative error of each kind: max|a - b| / max|b| of a tensor, of the tensors the worst."""
    largest = max(np.abs(gradient).max() for gradient in want.gradients.values())
    assert got.gradients.keys() == want.gradients.keys() == got.params.keys() == want.params.keys()
    return {
        "logits": relative(got.logits, want.logits),
        "loss": relative(got.loss, want.loss),
        "gradients": max(relative(got.gradients[p], g, SMALL * largest) for p, g in want.gradients.items()),
        "params": max(relative(got.params[path], value) for path, value in want.params.items()),
    }


def relative(got: np.ndarray, want: np.ndarray, least: float = 1e-30) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - want).max() / max(np.abs(want).max(), least))


def check(case: Subject, mesh_name: str, what: str) -> Any:
    """Compare a model on a mesh with itself on one device; return the sharded model."""
    model = case.build(mesh_named(mesh_name))
    got = results(model, case.inputs)
    found = errors(got, case.alone)
    print(f"{what:16} {mesh_name:9}", *(f"{kind} {error:.1e}" for kind, error in found.items()))
    too_far = {kind: error for kind, error in found.items() if error > TOLERANCE}
    assert not too_far, f"{what} on {mesh_name}: {too_far}"
    np.testing.assert_array_equal(got.tokens, case.alone.tokens)
    before = flatten(model.params, by_layer=False)
    for tree in got.left:  # without anyone pinning `out_shardings`
        for path, leaf in flatten(tree, by_layer=False).items():
            place = before[path].sharding
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), f"{path} moved: {leaf.sharding}, {place}"
    return model
