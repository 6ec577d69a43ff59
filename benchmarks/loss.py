"""The loss computed from the head in chunks of tokens: memory and time against the loss of whole logits.

One head over Qwen's vocabulary, 4096 tokens, loss and gradients by hidden states and kernel. Bars: temporary memory at
most 1/8 of the plain loss's, time at most 1.1 times, gradients equal to 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.rounds import Result, interleave, seconds
from easydel import LossConfig
from easydel.loss import UncomputedLogits, task_loss

MEMORY_BAR, TIME_BAR, GRADIENT_BAR = 1 / 8, 1.1, 1e-5
PLAIN = "plain"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--vocab", type=int, default=151936, help="size of the vocabulary (default: 151936)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a row (default: 4096)")
    parser.add_argument("--hidden", type=int, default=576, help="width of the hidden states (default: 576)")
    parser.add_argument("--chunks", nargs="+", default=["auto", "128", "512", "1024"], help="token_chunk_size to try")
    parser.add_argument("--dtype", default="float32", help="of hidden states and kernel (default: float32)")
    return parser.parse_args()


def inputs(options: argparse.Namespace) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return hidden states, a kernel and labels, a tenth of which do not count."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, options.tokens, options.hidden)).astype(options.dtype)
    kernel = (0.02 * jax.random.normal(keys[1], (options.hidden, options.vocab))).astype(options.dtype)
    labels = jax.random.randint(keys[2], (1, options.tokens), 0, options.vocab)
    return hidden, kernel, jnp.where(jax.random.uniform(keys[3], labels.shape) < 0.1, -100, labels)


def loss_of(chunk: str, hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the loss of whole logits, or with a `token_chunk_size`."""
    if chunk == PLAIN:
        logits = (hidden.reshape(-1, hidden.shape[-1]) @ kernel).reshape(*labels.shape, -1)
        return task_loss("causal-lm", logits, labels)[0]
    config = LossConfig(token_chunk_size=chunk if chunk == "auto" else int(chunk))
    return task_loss("causal-lm", UncomputedLogits(hidden, kernel), labels, config)[0]


def largest_errors(got: Any, want: Any) -> list[float]:
    """Return, for each gradient, the largest error over the largest number."""
    return [
        float(np.abs(np.asarray(g, np.float32) - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True)
    ]


def main() -> None:
    """Measure and report."""
    options = arguments()
    given = inputs(options)
    programs: dict[str, Any] = {}
    for chunk in (PLAIN, *options.chunks):
        function = jax.value_and_grad(functools.partial(loss_of, chunk), argnums=(0, 1))
        programs[chunk] = jax.jit(function).lower(*given).compile()
    about = report.environment()
    print(f"{about['cores']} cores of {about['processor']}, load average {about['load_average'][0]:.1f}")
    print(f"vocabulary {options.vocab}, {options.tokens} tokens, hidden {options.hidden}, {options.dtype}")

    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    loss, gradients = programs[PLAIN](*given)
    wanted = [np.asarray(g, np.float32) for g in gradients]
    for chunk in options.chunks:
        got, found = programs[chunk](*given)
        errors = ", ".join(f"{error:.1e}" for error in largest_errors(found, wanted))
        print(
            f"{chunk}: loss {float(got):.6f} (plain {float(loss):.6f}), gradients off by {errors} (bar: {GRADIENT_BAR})"
        )
        del found
    del gradients, wanted

    processors = Result("of all cores", "s", higher_is_better=False, values={name: [] for name in programs})

    def task(name: str) -> Callable[[], float]:
        def run() -> float:
            before = time.process_time()
            wall = seconds(lambda: jax.block_until_ready(programs[name](*given)))
            processors.values[name].append(time.process_time() - before)
            return wall

        return run

    timing = Result("loss and gradients", "s", higher_is_better=False)
    timing.values = interleave({name: task(name) for name in programs}, options.rounds, warmups=0)
    for name in programs:
        print(
            f"{name}: {timing.median(name):.2f} s, {timing.paired_ratio(name, PLAIN):.2f} of plain (bar: {TIME_BAR}), "
            f"{processors.paired_ratio(name, PLAIN):.2f} of its processor time; "
            f"temporary memory {memory[name] / 2**20:.0f} MiB, 1/{memory[PLAIN] / memory[name]:.1f} of plain "
            f"(bar: 1/{1 / MEMORY_BAR:.0f})"
        )


if __name__ == "__main__":
    main()
