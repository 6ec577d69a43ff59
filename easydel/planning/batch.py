"""The batch of a training step, and what the step minimises, for a model of any task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easydel.calls import takes
from easydel.sharding.activations import ROLES


def batch_shapes(module: Any, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays that a model of this task is trained on.

    Token ids int32 `[batch, seq]` and labels: one a token, one a row for sequence classification (floats if it is a
    regression or has independent labels), `[batch, 2]` for question answering. An encoder reads as many tokens as its
    decoder writes.
    """
    rows, tokens = (batch_size,), (batch_size, sequence_length)
    config, task = module.config, module.model_task
    shape: tuple[int, ...] = tokens
    dtype: Any = jnp.int32
    if task == "sequence-classification":
        problem, count = getattr(config, "problem_type", None), config.num_labels
        regression = problem == "regression" or (problem is None and count == 1)
        shape = (*rows, count) if problem == "multi_label_classification" or (regression and count > 1) else rows
        dtype = jnp.float32 if regression or problem == "multi_label_classification" else jnp.int32
    elif task == "question-answering":
        shape = (*rows, 2)
    batch = {"input_ids": jax.ShapeDtypeStruct(tokens, jnp.int32), "labels": jax.ShapeDtypeStruct(shape, dtype)}
    if takes(module, "decoder_input_ids") and not has_loss(module):
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def check_divides(batch_size: int, sequence_length: int, mesh: Any) -> None:
    """Check that each device gets an equal part of the tokens.

    Raises:
        ValueError: it does not, or there are no tokens.
    """
    for name, size, role in (("batch_size", batch_size, "batch"), ("sequence_length", sequence_length, "sequence")):
        axes = {axis: mesh.shape[axis] for axis in ROLES[role] if axis in mesh.shape}
        parts = 1
        for count in axes.values():
            parts *= count
        if size < 1 or size % parts:
            shown = "·".join(f"{axis}={count}" for axis, count in axes.items())
            raise ValueError(f"{name}={size} must be a positive multiple of {parts} ({shown}): each device gets a part")


def has_loss(module: Any) -> bool:
    """Whether labels give this model a loss; a backbone alone has none, unless it takes labels itself."""
    return module.model_task != "embedding" and (module.model_task != "base" or takes(module, "labels"))


def objective(model: Any, batch: Mapping[str, Any]) -> jax.Array:
    """Return what a step minimises: the task's loss; without one, the mean square of all that the model gives back."""
    if has_loss(model):
        return model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs)
    logits = outputs if isinstance(outputs, jax.Array) else getattr(outputs, "logits", None)
    if logits is not None and model.model_task == "base" and "labels" in batch:
        return model.compute_loss(labels=batch["labels"], logits=logits)[0]
    floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.mean(jnp.square(leaf.astype(jnp.float32))) for leaf in floats), jnp.float32(0))
