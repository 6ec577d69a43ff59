"""What the workers of the tests of failures do: a small training run, taken up wherever it was left."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1  # noqa: F401  (before a fork, so that no worker has to)

import easydel
from easydel import LlamaConfig, LlamaForCausalLM, distributed
from easydel.checkpoints import Checkpoints
from easydel.cli.app import app
from easydel.distributed.verdict import whole_steps
from easydel.sharding import create_mesh
from easydel.training import Trainer, TrainingArguments

VOCAB, LENGTH, ROWS = 32, 12, 8
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip

OPTIMIZER = dict(optimizer="sgd", momentum=0.9, learning_rate=0.1, schedule="cosine")


def batch_of(index: int) -> dict[str, np.ndarray]:
    """Return the whole batch of a step."""
    random = np.random.default_rng(index)
    ids = ((random.integers(0, VOCAB, (ROWS, 1)) + np.arange(LENGTH)) % VOCAB).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def trainer(folder: str, dims: tuple[int, ...], steps: int, pace: float = 0.0, **options: Any) -> Trainer:
    """Return a run of so many steps on a mesh of these dimensions, `pace` seconds a step at least."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, sharding_axis_dims=dims), rngs=nnx.Rngs(0))
    if jax.device_count() > 1:
        model.shard_model()

    def data(index: int) -> dict[str, np.ndarray]:
        time.sleep(pace)
        return batch_of(index)

    usual: dict[str, Any] = dict(
        max_steps=steps, save_steps=4, log_steps=1, log_to=("jsonl",), save_model=False, **OPTIMIZER
    )  # fmt: skip
    callbacks = options.pop("callbacks", ())
    return Trainer(model, TrainingArguments(folder, **usual | options), data, callbacks=callbacks)


def train(folder: str, dims: tuple[int, ...], steps: int, pace: float = 0.0, **options: Any) -> dict[str, Any]:
    """Train; return from which checkpoint, why it ended, and at which step."""
    begun = (whole_steps(Path(folder, "checkpoints")) or [0])[-1]
    result = trainer(folder, dims, steps, pace, **options).train()
    return {"from": begun, "reason": result.reason, "step": result.progress.iteration}


def fail_at(folder: str, dims: tuple[int, ...], steps: int, where: int, at: int) -> None:
    """Train; a process raises an error after a step."""

    def fail(run: Trainer, record: dict[str, Any]) -> None:
        if jax.process_index() == where and record["step"] == at:
            raise OSError(f"{Path('/nowhere/data.txt')}: the disk has gone")

    train(folder, dims, steps, callbacks=(fail,))


def fill_the_disk(folder: str, dims: tuple[int, ...], steps: int, at: int) -> None:
    """Train; after a step, when the checkpoint before is whole, process 1 fills what is left of the disk."""

    def fill(run: Trainer, record: dict[str, Any]) -> None:
        if jax.process_index() != 1 or record["step"] != at:
            return
        while not whole_steps(run.directory / "checkpoints"):
            time.sleep(0.01)
        with contextlib.suppress(OSError), (run.directory.parent / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    train(folder, dims, steps, callbacks=(fill,))


def join_as(port: int, number: int, version: str, agreed: dict[str, Any]) -> None:
    """Join a run of two as a process of another version and configuration might."""
    easydel.__version__ = version
    distributed.initialize(f"127.0.0.1:{port}", 2, number, agreed=agreed, wait=10)


def command(arguments: list[str]) -> None:
    """Be `easydel` with some arguments."""
    app(arguments, standalone_mode=False)


def pass_on(folder: str, dims: tuple[int, ...], step: int) -> dict[str, list[int]]:
    """Restore what the step before left (make it at step 0), and save it from here; return the shapes of shards."""
    mesh = create_mesh(dims)
    places = {
        "params/kernel": PartitionSpec("fsdp", "tp"), "params/scale": PartitionSpec("fsdp"), "step": PartitionSpec(),
        "params/half": PartitionSpec(("dp", "fsdp"), None),
    }  # fmt: skip
    values = values_to_pass_on()
    shardings = {name: NamedSharding(mesh, spec) for name, spec in places.items()}
    with Checkpoints(folder) as checkpoints:
        if step:
            like = {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name])
                for name, value in values.items()
            }
            arrays = checkpoints.restore(like, step - 1).arrays
        else:
            arrays = {
                name: jax.make_array_from_callback(value.shape, shardings[name], value.__getitem__)
                for name, value in values.items()
            }
        for name, array in arrays.items():
            assert array.sharding == shardings[name]
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == values[name][shard.index].tobytes(), name
        checkpoints.save(step, arrays, {})
        checkpoints.wait()
    return {name: list(array.addressable_shards[0].data.shape) for name, array in arrays.items()}


def values_to_pass_on() -> dict[str, np.ndarray]:
    """Return arrays of several types."""
    random = np.random.default_rng(0)
    return {
        "params/kernel": random.normal(size=(16, 24)).astype(np.float32),
        "params/scale": random.normal(size=(8,)).astype(np.float32),
        "params/half": random.normal(size=(8, 3)).astype(jnp.bfloat16),
        "step": np.int32(7)[...],
    }
