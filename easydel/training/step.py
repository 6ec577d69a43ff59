"""One compiled training step: gradients over micro-batches, one update, nothing done if it is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from easydel.infra.base_state import EasyDeLState
from easydel.infra.functional import set_dropout
from easydel.loss import LossConfig
from easydel.paths import named_variables

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        loss_config: of the loss; `None`: the task's own.
        gradient_accumulation_steps: how many micro-batches a batch is split into, one after the other.
        seed: of dropout.
        schedule: number of updates → learning rate, which is then among the metrics.
    """

    loss_config: LossConfig | None = None
    gradient_accumulation_steps: int = 1
    seed: int = 0
    schedule: Callable[[Any], Any] | None = None


class TrainStep:
    """Updates the arrays of a training state; compiled once, the structure of the state closed over.

    A call costs on the host what a bare `jax.jit` of the same arrays costs: between steps the state is a list of
    arrays, put together only when it is asked for.

    Args:
        state: where to start.
        settings: how a step is computed.
        keep: whether the state, and the model it was made from, stay usable: its arrays are copied, as the first step
            would use them up.

    Attributes:
        iteration: how many batches have been seen.
    """

    def __init__(self, state: EasyDeLState, settings: StepSettings | None = None, *, keep: bool = True) -> None:
        self.settings = settings or StepSettings()
        leaves, self._structure = jax.tree.flatten(state)
        self._leaves = [jnp.copy(leaf) for leaf in leaves] if keep else leaves
        self.iteration = 0
        # The update must leave everything where it was: else the compiler chooses anew for each gradient.
        shardings = [leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None for leaf in leaves]
        step = make_step(self._structure, self.settings, dropout=has_dropout(state))
        self._run = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    @property
    def state(self) -> EasyDeLState:
        """The state now; its arrays are gone after the next step, unless they are copied."""
        return jax.tree.unflatten(self._structure, self._leaves)

    def restore(self, state: EasyDeLState, iteration: int) -> None:
        """Go on from another state of the same structure; its arrays are used up."""
        leaves, structure = jax.tree.flatten(state)
        if structure != self._structure:  # type: ignore[operator]
            raise ValueError("this state has another structure than the one training began with")
        self._leaves, self.iteration = leaves, iteration

    def __call__(self, batch: Batch) -> Metrics:
        """Do a step.

        Args:
            batch: what the forward pass takes, and `labels`; the rows must divide by the micro-batches.

        Returns:
            Float32 or int32 `[]`, still being computed: `loss`, `grad_norm` (before any clipping), `num_tokens`,
            `is_finite` and what else the task's loss tells.
        """
        self._leaves, metrics = self._run(self._leaves, batch, self.iteration)
        self.iteration += 1
        return metrics


def has_dropout(state: EasyDeLState) -> bool:
    """Whether the model draws random numbers while it is trained."""
    return bool(named_variables(state.model, nnx.RngKey, by_layer=False))


def make_step(
    structure: Any, settings: StepSettings, *, dropout: bool
) -> Callable[[list[jax.Array], Batch, Any], tuple[list[jax.Array], Metrics]]:
    """Return the function of a step: the arrays of a state, a batch, its number → the new arrays, metrics."""

    def update(state: EasyDeLState, grads: Any) -> tuple[Any, ...]:
        new = state.apply_gradients(grads)
        return new.step, new.trainable_params, new.opt_state

    def keep(state: EasyDeLState, grads: Any) -> tuple[Any, ...]:
        del grads
        return state.step, state.trainable_params, state.opt_state

    def step(leaves: list[jax.Array], batch: Batch, iteration: Any) -> tuple[list[jax.Array], Metrics]:
        state: EasyDeLState = jax.tree.unflatten(structure, leaves)
        key = jax.random.fold_in(jax.random.key(settings.seed), iteration) if dropout else None
        grads, metrics = accumulate(state, batch, settings, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        # A branch, not a choice number by number: the arrays then pass through memory once, changed where they are.
        count, params, opt_state = jax.lax.cond(finite, update, keep, state, grads)
        new = jax.tree.leaves(replace(state.with_params(params), step=count, opt_state=opt_state))
        metrics |= {"grad_norm": norm, "is_finite": finite}
        if settings.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(settings.schedule(state.step), jnp.float32)
        return new, metrics

    return step


def accumulate(
    state: EasyDeLState, batch: Batch, settings: StepSettings, key: jax.Array | None
) -> tuple[dict[str, Any], Metrics]:
    """Return gradients and metrics of a batch, those of its micro-batches put together.

    A mean over valid targets is put together as such: each micro-batch counts by how many it has.
    """
    count, config = settings.gradient_accumulation_steps, settings.loss_config

    def loss_of(params: dict[str, Any], micro: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        model = state.with_params(params).model
        set_dropout(model, key)
        inputs = {name: array for name, array in micro.items() if name != "labels"}
        return model.compute_loss(labels=micro["labels"], config=config, **inputs)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if count == 1:
        (loss, metrics), grads = gradient(state.trainable_params, batch, key)
        return grads, metrics | {"loss": loss}

    averages = config is None or (config.reduction == "mean" and config.loss_normalizing_factor is None)
    micros = {name: split_rows(array, count) for name, array in batch.items()}
    keys = None if key is None else jax.random.split(key, count)

    def weighted(micro: Batch, key: jax.Array | None) -> tuple[dict[str, Any], Metrics]:
        (loss, metrics), grads = gradient(state.trainable_params, micro, key)
        tokens = metrics["num_tokens"].astype(jnp.float32)
        weight = tokens if averages else jnp.float32(1)
        sums = {name: value * weight for name, value in metrics.items()}
        sums |= {"loss": loss * weight, "num_tokens": tokens, "weight": weight}
        if "accuracy" in metrics:
            sums["accuracy"] = metrics["accuracy"] * tokens
        return jax.tree.map(lambda grad: grad.astype(jnp.float32) * weight, grads), sums

    def add(total: Any, one: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, weighted(*one)), None

    shapes = jax.eval_shape(weighted, *jax.tree.map(lambda leaf: leaf[0], (micros, keys)))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(add, zero, (micros, keys))
    tokens, weight = (jnp.maximum(sums.pop(name), 1) for name in ("num_tokens", "weight"))
    divisor = weight if averages else jnp.float32(1)
    metrics = {name: value / (tokens if name == "accuracy" else divisor) for name, value in sums.items()}
    grads = jax.tree.map(lambda grad, like: (grad / divisor).astype(like.dtype), grads, state.trainable_params)
    return grads, metrics | {"num_tokens": tokens}


def split_rows(array: jax.Array, count: int) -> jax.Array:
    """Return `[count, rows / count, …]`: every `count`-th row belongs to one, so that each device keeps its rows."""
    if array.shape[0] % count:
        raise ValueError(
            f"a batch of {array.shape[0]} rows cannot be split into gradient_accumulation_steps={count}: "
            "choose a batch size that it divides"
        )
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
