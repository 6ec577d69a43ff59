"""What the workers of the tests of failures do: a small training run, taken up wherever it was left."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1  # noqa: F401  (before a fork, so that no worker has to)

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.distributed.verdict import whole_steps
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


def share_of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return this process's rows of a batch that is split over all of them."""
    rows = ROWS // jax.process_count()
    first = jax.process_index() * rows
    return {name: array[first : first + rows] for name, array in batch.items()}


def trainer(folder: str, dims: tuple[int, ...], steps: int, pace: float = 0.0, **options: Any) -> Trainer:
    """Return a run of so many steps on a mesh of these dimensions, `pace` seconds a step at least."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, sharding_axis_dims=dims), rngs=nnx.Rngs(0))
    if jax.device_count() > 1:
        model.shard_model()

    def data(index: int) -> dict[str, np.ndarray]:
        time.sleep(pace)
        return share_of(batch_of(index))

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
