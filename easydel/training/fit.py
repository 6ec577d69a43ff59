"""The training loop: one compiled step, donated state, a report after each step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from easydel.infra.base_state import EasyDeLState
from easydel.training.data import Batch


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: its number, from 1.
        loss: mean negative log-likelihood over the batch before the update, in nats per token.
        tokens_per_second: tokens of the batch over the wall time of the step.
    """

    step: int
    loss: float
    tokens_per_second: float


@functools.partial(jax.jit, donate_argnames="state")
def _train_step(state: EasyDeLState, batch: dict[str, jax.Array]) -> tuple[EasyDeLState, jax.Array]:
    def loss_of(params: dict[str, Any]) -> jax.Array:
        return replace(state, params=params).model(**batch).loss

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads), loss


def fit(
    state: EasyDeLState,
    batch_of: Callable[[int], Batch],
    steps: int,
    on_step: Callable[[EasyDeLState, StepReport], bool | None] = lambda state, report: None,
) -> EasyDeLState:
    """Train until the state has done `steps` updates in all, counting those it comes with.

    Args:
        state: where to start; it is copied, so that the model it came from stays usable.
        batch_of: the batch of a step (from 0): int32 arrays `input_ids` and `labels`, [batch, length].
        steps: the number of the last step; a state that has reached it is returned as it is.
        on_step: called after each step with the new state (valid during the call) and its report; training ends
            early if it returns True.

    Returns:
        The state after the last step.
    """
    state = jax.tree.map(jnp.copy, state)
    for index in range(int(state.step), steps):
        batch = batch_of(index)
        began = time.perf_counter()
        state, loss = _train_step(state, {name: jnp.asarray(array) for name, array in batch.items()})
        value = float(loss)  # waits for the step
        rate = batch["input_ids"].size / (time.perf_counter() - began)
        if on_step(state, StepReport(index + 1, value, rate)):
            break
    return state
