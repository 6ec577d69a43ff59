"""What the trainer's loop costs on the host, beside a bare `jax.jit` of the same arrays: `python -m benchmarks.host`.

A model of many small arrays, so that the arithmetic is next to nothing. Both run the same compiled step; the difference
is what `Trainer` does between two steps: fetching a batch, checking it, placing it, counting, logging every tenth step.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import report
from benchmarks.rounds import Result, interleave
from easydel import LlamaConfig, LlamaForCausalLM
from easydel.training import StepSettings, Trainer, TrainingArguments
from easydel.training.step import make_step

STEPS = 100


def model() -> LlamaForCausalLM:
    """Return a model of 30 thin layers: 273 parameters, 821 arrays with AdamW's moments."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config, rngs=nnx.Rngs(0))


def batch_of(index: int) -> dict[str, np.ndarray]:
    """Return 2 × 4 tokens."""
    ids = ((np.arange(8, dtype=np.int32) + index) % 64).reshape(2, 4)
    return {"input_ids": ids, "labels": ids}


def bare() -> Any:
    """Return a function that times steps of the compiled function alone, in seconds a step."""
    state = model().to_state(optax.adamw(1e-4))
    leaves, structure = jax.tree.flatten(state)
    step = jax.jit(make_step(structure, StepSettings(), dropout=False), donate_argnums=0)
    batch = jax.device_put(batch_of(0))
    held = [leaves]

    def run() -> float:
        began = time.perf_counter()
        for index in range(STEPS):
            held[0], metrics = step(held[0], batch, index)
        jax.block_until_ready((held[0], metrics))
        return (time.perf_counter() - began) / STEPS

    return run


def through_trainer(folder: Path) -> Any:
    """Return a function that times the trainer's steps likewise."""
    arguments = TrainingArguments(
        str(folder), max_steps=10**9, schedule="constant", max_grad_norm=None, log_to=("jsonl",), save_model=False
    )
    times: list[float] = []

    def stop(trainer: Trainer, record: dict[str, Any]) -> bool:
        times.append(record["seconds"])
        return record["step"] % STEPS == 0

    trainer = Trainer(model(), arguments, batch_of, optimizer=optax.adamw(1e-4), callbacks=[stop])

    def run() -> float:
        # Straight into the loop: what comes before and after it happens once a run.
        from easydel.checkpoints import Checkpoints
        from easydel.training.interrupts import Interrupts

        with Checkpoints(folder / "checkpoints") as checkpoints:
            trainer.logs.start(0, None)
            began = time.perf_counter()
            trainer._run(checkpoints, Interrupts())
            seconds = (time.perf_counter() - began) / STEPS
            trainer.logs.close()
        return seconds

    return run


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        tasks = {"bare jax.jit": bare(), "easydel": through_trainer(Path(folder))}
        values = interleave(tasks, rounds)
    result = Result("time of a step", "ms", higher_is_better=False)
    result.values = {name: [1e3 * value for value in row] for name, row in values.items()}
    print(report.environment())
    for name in result.values:
        print(f"{name:<14}{result.median(name):8.2f} ms a step")
    differences = [a - b for a, b in zip(result.values["easydel"], result.values["bare jax.jit"], strict=True)]
    print(f"the trainer's part: {statistics.median(differences):.2f} ms a step (bar: 0.5)")


if __name__ == "__main__":
    main()
