"""Optimizers and schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax

from easydel.paths import flatten, nest
from easydel.stacked import layer_paths

if TYPE_CHECKING:
    from easydel.training.arguments import TrainingArguments

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor")
SCHEDULES = ("linear", "cosine", "constant", "wsd")


def make_schedule(arguments: TrainingArguments, total_steps: int | None) -> optax.Schedule:
    """Return the learning rate of each step, from 0.

    It rises in a line over the warmup; then it stays (`constant`), falls in a line (`linear`), falls as half a cosine
    (`cosine`), or stays until the last part of the run and then falls in a line (`wsd`, arXiv:2404.06395), to
    `min_learning_rate_ratio` of its height.

    Raises:
        ValueError: the schedule needs the number of steps, or warmup or decay have no room in the run.
    """
    peak, warmup = arguments.learning_rate, arguments.warmup_steps
    low = peak * arguments.min_learning_rate_ratio
    if arguments.warmup_ratio or arguments.schedule != "constant":
        if total_steps is None:
            raise ValueError(
                f"schedule={arguments.schedule!r} needs to know where the run ends, which this data does not tell: "
                "set max_steps, or use schedule='constant' with warmup_steps"
            )
        warmup = warmup or int(total_steps * arguments.warmup_ratio)
        if warmup >= total_steps:
            raise ValueError(f"a warmup of {warmup} steps is as long as the run of {total_steps}; shorten it")
    left = (total_steps or 0) - warmup
    falling = round(left * arguments.decay_ratio)
    if arguments.schedule == "wsd" and arguments.decay_ratio and not falling:
        raise ValueError(
            f"decay_ratio={arguments.decay_ratio} of the {left} steps after the warmup is not a single one; raise it"
        )
    rising = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    then: list[tuple[optax.Schedule, int]] = {
        "constant": [(optax.constant_schedule(peak), 0)],
        "linear": [(optax.linear_schedule(peak, low, left), 0)],
        "cosine": [(optax.cosine_decay_schedule(peak, max(left, 1), arguments.min_learning_rate_ratio), 0)],
        "wsd": [(optax.constant_schedule(peak), 0), (optax.linear_schedule(peak, low, falling), left - falling)],
    }[arguments.schedule]
    return optax.join_schedules([rising, *(part for part, _ in then)], [warmup + start for _, start in then])


def make_optimizer(arguments: TrainingArguments, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer that the arguments name: clipping by the global norm first, decay of matrices only."""
    decay = {"weight_decay": arguments.weight_decay, "mask": is_matrix}
    betas = {"b1": arguments.adam_beta1, "b2": arguments.adam_beta2}
    made: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(schedule, **betas, eps=arguments.adam_epsilon, **decay),
        "adam": lambda: optax.adam(schedule, **betas, eps=arguments.adam_epsilon),
        "sgd": lambda: optax.sgd(schedule, momentum=arguments.momentum or None),
        "lion": lambda: optax.lion(schedule, **betas, **decay),
        "adafactor": lambda: _adafactor(schedule, arguments.weight_decay),
    }
    clip = [optax.clip_by_global_norm(arguments.max_grad_norm)] if arguments.max_grad_norm else []
    return optax.chain(*clip, made[arguments.optimizer]())


def _adafactor(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Return Adafactor (arXiv:1804.04235) whose decay goes with the learning rate; optax's own does not."""
    decay = [optax.add_decayed_weights(-weight_decay, is_matrix)] if weight_decay else []
    return optax.chain(optax.adafactor(None), *decay, optax.scale_by_learning_rate(schedule, flip_sign=False))


def is_matrix(params: Any) -> Any:
    """Say of each parameter whether weight decay applies: not to norms and biases, which have one dimension.

    Each layer of a stack counts as if it stood alone.
    """
    flat = flatten(params, by_layer=False) if isinstance(params, dict) else None
    if flat is None:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    return nest({path: leaf.ndim - (layer_paths(path) is not None) > 1 for path, leaf in flat.items()})
