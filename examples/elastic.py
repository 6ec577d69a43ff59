"""Lose half of the processes of a run, and go on with the others from the last checkpoint.

    python examples/elastic.py --processes 4 --steps 24

Trains a small model in several processes of one CPU device each, kills half of them, starts the run again on those that
are left, with a smaller mesh, and compares its losses with those of a run with the same change of mesh that nobody
killed.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAVE_STEPS = 4


def work(folder: str, steps: int) -> None:
    """Be one of the processes of a run: train to a step, from wherever the run was left."""
    import jax
    from flax import nnx
    from transformers import AutoTokenizer

    from easydel import DataConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, distributed
    from easydel.assets import embedded_model_path, embedded_text_path

    distributed.initialize()  # who the others are is in the environment
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    if jax.device_count() > 1:
        model.shard_model()  # all devices on fsdp, however many there are
    arguments = TrainingArguments(
        folder, max_steps=steps, batch_size=8, learning_rate=1e-2, schedule="constant", save_steps=SAVE_STEPS,
        log_steps=1, log_to=("jsonl",), save_model=False,
    )  # fmt: skip
    Trainer(model, arguments, DataConfig(embedded_text_path(), sequence_length=32), tokenizer=tokenizer).train()


def start(folder: Path, processes: int, steps: int) -> list[subprocess.Popen[str]]:
    """Start a run; on a cluster its scheduler would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    told = {"EASYDEL_COORDINATOR": f"127.0.0.1:{port}", "EASYDEL_PROCESSES": str(processes), "JAX_PLATFORMS": "cpu"}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    command = [sys.executable, __file__, "--work", str(folder), "--steps", str(steps)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | told | {"EASYDEL_PROCESS_ID": str(number), "XLA_FLAGS": flags},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip


def finish(run: list[subprocess.Popen[str]], *codes: int) -> list[str]:
    """Wait for all; return what each wrote to stderr."""
    said = [process.communicate()[1] for process in run]
    for process, text in zip(run, said, strict=True):
        if process.returncode not in codes:
            sys.exit(f"exit code {process.returncode}:\n{text}")
    return said


def lose_half(folder: Path, processes: int, steps: int) -> int:
    """Start a run and kill half of it; return the step that is left of it."""
    from easydel.distributed import EXIT_CODE
    from easydel.distributed.verdict import whole_steps

    run = start(folder, processes, steps)
    while not any(step >= SAVE_STEPS for step in whole_steps(folder / "checkpoints")):
        if any(process.poll() is not None for process in run):
            finish(run, 0)
            sys.exit("the run was over before anybody could be killed: give it more steps")
        time.sleep(0.01)
    for process in run[processes // 2 :]:
        process.kill()
    killed = time.monotonic()
    said = finish(run, EXIT_CODE, -9)
    print(f"killed {processes - processes // 2} of {processes}; all gone after {time.monotonic() - killed:.1f} s.")
    print("process 0 said:\n" + said[0][said[0].index("easydel: ") :])
    return whole_steps(folder / "checkpoints")[-1]


def main() -> None:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="of the run before the loss; at least 2")
    parser.add_argument("--steps", type=int, default=24, help="of the whole run")
    parser.add_argument("--output", type=Path, help="folder for both runs [default: a temporary one]")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.steps)
        return
    if given.processes < 2:
        parser.error("--processes: at least 2, or there is nothing to lose")

    from easydel.training.logs import read_log

    with tempfile.TemporaryDirectory() as temporary:
        output = given.output or Path(temporary)
        left = given.processes - (given.processes - given.processes // 2)
        killed, calm = output / "killed", output / "calm"
        step = lose_half(killed, given.processes, given.steps)
        finish(start(killed, left, given.steps), 0)
        print(f"went on from step {step} with {left}, to the end; now the same without a loss:")
        finish(start(calm, given.processes, step), 0)
        finish(start(calm, left, given.steps), 0)
        losses = [[record["loss"] for record in read_log(folder / "log.jsonl")] for folder in (killed, calm)]
    print("step  processes  loss with the loss of half  without")
    for number, (one, other) in enumerate(zip(*losses, strict=True), start=1):
        print(f"{number:4}  {given.processes if number <= step else left:9}  {one:26.6f}  {other:7.6f}")
    largest = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print(f"largest difference: {largest:.1e}")


if __name__ == "__main__":
    main()
