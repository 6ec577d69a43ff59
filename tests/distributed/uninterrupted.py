"""The run that nothing interrupts: in one process, with the mesh changes that the killed ones went through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.checkpoints import Checkpoints
from easydel.infra.state_arrays import named_arrays, with_arrays
from easydel.sharding import create_mesh
from easydel.training import TrainingArguments
from easydel.training.optimizers import make_optimizer, make_schedule
from easydel.training.sources import place_batch
from easydel.training.step import TrainStep
from tests.distributed import runs


@dataclass(frozen=True)
class Part:
    """A part of a run: on how many processes of how many devices, on which mesh, and to which step it counts."""

    processes: int
    devices: int
    dims: tuple[int, ...]
    until: int = 0


def final_arrays(parts: Sequence[Part], steps: int) -> dict[str, np.ndarray]:
    """Train through the parts, from one mesh to the next in memory; return the arrays of the last state."""
    arguments = TrainingArguments("unused", max_steps=steps, **runs.OPTIMIZER)
    made: dict[Part, TrainStep] = {}
    arrays: dict[str, np.ndarray] | None = None
    begun = 0
    for part in parts:
        key = replace(part, until=0)
        if key not in made:
            mesh = create_mesh(part.dims, devices=jax.devices()[: part.processes * part.devices])
            model = LlamaForCausalLM(LlamaConfig(**runs.SIZES), rngs=nnx.Rngs(0)).shard_model(mesh=mesh)
            made[key] = TrainStep(model.to_state(make_optimizer(arguments, make_schedule(arguments, steps))))
            made[key].mesh = mesh
        step = made[key]
        if arrays is not None:
            like = named_arrays(step.state)
            moved = {name: jax.device_put(array, like[name].sharding) for name, array in arrays.items()}
            step.restore(replace(step.state, **with_arrays(step.state, moved)), begun)
        for index in range(begun, part.until):
            step(place_batch(runs.batch_of(index), step.mesh))
        arrays = {name: np.asarray(array) for name, array in named_arrays(step.state).items()}
        begun = part.until
    assert arrays is not None
    return arrays


def saved_arrays(folder: Path, step: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Read the arrays of a checkpoint to the host."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for name, array in like.items()}
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(wanted, step)
    return {name: np.asarray(array) for name, array in restored.arrays.items()}
