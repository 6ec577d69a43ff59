"""Perplexity of a language model on a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easydel.infra.functional import bind, set_dropout, split
from easydel.loss import LossConfig
from easydel.training.data import Batch


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        nats: summed negative log-likelihood.
        tokens: how many tokens were predicted.
    """

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    def bits_per_byte(self, byte_count: int) -> float:
        """Return bits needed per byte of the text; comparable between tokenizers."""
        return self.nats / math.log(2) / byte_count


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def _metrics(graphdef: Any, params: Any, other: Any, batch: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    model = bind(graphdef, params, other)
    set_dropout(model, None)
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    return model.compute_loss(labels=batch["labels"], config=config, **inputs)[1]


def evaluate(
    graphdef: Any, params: Any, other: Any, batches: Iterable[Mapping[str, jax.Array]], config: LossConfig | None = None
) -> dict[str, float]:
    """Measure a model on batches, without dropout.

    Args:
        graphdef: its structure.
        params: its parameters.
        other: its other state.
        batches: what the forward pass takes, and `labels`.
        config: of the loss; `None`: the task's own. Whatever its reduction, the result is a mean.

    Returns:
        `eval_loss` and the other metrics of the task's loss, means over all targets; `eval_tokens`, how many; of a
        language model `eval_perplexity`, too.

    Raises:
        ValueError: no label counts.
    """
    if config is not None:
        config = replace(config, reduction="mean", loss_normalizing_factor=None)
    sums: dict[str, float] = {}
    tokens = 0
    for batch in batches:
        told = jax.device_get(_metrics(graphdef, params, other, dict(batch), config))
        count = int(told.pop("num_tokens"))
        tokens += count
        for name, value in told.items():
            sums[name] = sums.get(name, 0.0) + float(value) * count
    if tokens == 0:
        raise ValueError("an evaluation needs at least one label that is not -100, got none; are the data empty?")
    record = {f"eval_{name}": total / tokens for name, total in sums.items()}
    return record | {"eval_perplexity": math.exp(min(record["eval_loss"], 700.0)), "eval_tokens": tokens}


def measure_perplexity(model: Any, batches: Iterable[Batch]) -> Perplexity:
    """Measure a causal language model on batches of `input_ids` and `labels`, both int32 [batch, length].

    Labels are the tokens themselves (position i is predicted from those before it); `-100` is not counted.

    Raises:
        ValueError: no label counts.
    """
    graphdef, params, other = split(model)
    arrays = ({name: jnp.asarray(array) for name, array in batch.items()} for batch in batches)
    record = evaluate(graphdef, params, other, arrays)
    return Perplexity(record["eval_loss"] * record["eval_tokens"], int(record["eval_tokens"]))
