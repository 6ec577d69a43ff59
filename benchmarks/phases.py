"""What is measured: each phase gives the quantities of all contestants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory
from benchmarks.checkpoint import model_bytes
from benchmarks.membw import bandwidth
from benchmarks.rounds import Result, interleave, seconds

MEMORY = "streaming reads"
"""Stands among those who decode for the memory's own speed, measured in the same rounds."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the work. `path` holds the checkpoint, `tiny` one to warm up with."""

    path: Path
    tiny: Path
    vocab_size: int
    rounds: int
    prompt: int = 512
    decode_prompt: int = 32
    new_tokens: int = 64
    batch: tuple[int, int] = (2, 256)
    loss_tolerance: float = 1e-3
    measures_memory: bool = False

    def tokens(self, batch: int, length: int, seed: int = 0) -> np.ndarray:
        """Return random token ids, int32 `[batch, length]`."""
        return np.random.default_rng(seed).integers(0, self.vocab_size, (batch, length), dtype=np.int32)


def check_equal(everybody: list[Any], plan: Plan, tolerance: float = 1e-4, tokens: bool = True) -> dict[str, float]:
    """Raise unless all compute the same logits and greedy tokens: nobody is measured on other work.

    Args:
        everybody: contestants that have loaded the checkpoint; the first is the reference.
        plan: gives the prompts.
        tolerance: of the logits, relative to their largest magnitude if that exceeds one.
        tokens: whether greedy tokens are compared, too.

    Returns:
        The largest difference of each contestant's logits.
    """
    ids, prompt = plan.tokens(2, 48, seed=1), plan.tokens(1, plan.decode_prompt, seed=2)
    count = min(32, plan.new_tokens)
    logits, made = everybody[0].logits(ids), everybody[0].generate(prompt, count)
    scale = max(1.0, float(np.abs(logits).max()))
    differences = {}
    for other in everybody[1:]:
        difference = float(np.abs(other.logits(ids) - logits).max())
        if not difference <= tolerance * scale:
            raise AssertionError(f"{other.name}: logits differ by {difference} from {everybody[0].name}'s")
        found = other.generate(prompt, count)
        if tokens and not np.array_equal(found, made):
            raise AssertionError(f"{other.name}: greedy tokens {found} differ from {everybody[0].name}'s {made}")
        differences[other.name] = difference
    return differences


def load(everybody: list[Any], plan: Plan) -> list[Result]:
    """Time from_pretrained until all weights are in memory; the files stay in the page cache."""

    def once(one: Any) -> float:
        one.unload()
        took = seconds(lambda: one.load(plan.path))
        one.unload()
        return took

    for one in everybody:
        one.load(plan.tiny)
    tasks = {one.name: _bind(once, one) for one in everybody}
    return [Result("load", "s", False, interleave(tasks, plan.rounds))]


def peak(everybody: list[Any], plan: Plan) -> list[Result]:
    """Measure each contestant's load in processes of its own: the peak over idle, and the first load's time."""
    size = model_bytes(plan.path)
    peaks: dict[str, list[float]] = {one.name: [] for one in everybody}
    first: dict[str, list[float]] = {one.name: [] for one in everybody}
    for _ in range(min(plan.rounds, 3)):
        for one in everybody:
            found = memory.measure(one.name, plan.tiny, plan.path)
            peaks[one.name].append((found["peak"] - found["idle"]) / size)
            first[one.name].append(found["seconds"])
    return [
        Result("first load of a process", "s", False, first),
        Result("peak memory of a load", "× model", False, peaks),
    ]


def prefill(everybody: list[Any], plan: Plan) -> list[Result]:
    """Time the way from a prompt to its first new token."""
    ids = plan.tokens(1, plan.prompt)

    def once(work: Callable[[], object]) -> float:
        return plan.prompt / seconds(work)

    _load_all(everybody, plan)
    tasks = {one.name: _bind(once, _bind(one.generate, ids, 1)) for one in everybody}
    for one in everybody:
        if hasattr(one, "forward"):
            tasks[f"{one.name} forward"] = _bind(once, _bind(one.forward, ids))
    return [Result(f"prefill of {plan.prompt} tokens", "tokens/s", True, interleave(tasks, plan.rounds, warmups=2))]


def decode(everybody: list[Any], plan: Plan) -> list[Result]:
    """Time the tokens after the first, batch 1: the difference of a long and a one-token generation.

    Where `plan.measures_memory`, a further entry says how often a second as many bytes as the weights' can be read.
    """
    ids = plan.tokens(1, plan.decode_prompt)

    def once(one: Any) -> float:
        short = seconds(lambda: one.generate(ids, 1))
        long = seconds(lambda: one.generate(ids, 1 + plan.new_tokens))
        return plan.new_tokens / (long - short) if long > short else math.nan

    _load_all(everybody, plan)
    tasks = {one.name: _bind(once, one) for one in everybody}
    if plan.measures_memory:
        tasks[MEMORY] = _bind(_reads_a_second, model_bytes(plan.path))
    return [Result("decode, batch 1", "tokens/s", True, interleave(tasks, plan.rounds, warmups=2))]


def _reads_a_second(size: int) -> float:
    """Return how often a second `size` bytes are read, by the fastest way to read them."""
    return max(bandwidth(size / 1e9, repeats=3).values()) / size


def train(everybody: list[Any], plan: Plan) -> list[Result]:
    """Time a training step; the losses of the first steps must agree."""
    ids = plan.tokens(*plan.batch)
    losses: dict[str, list[float]] = {one.name: [] for one in everybody}

    def once(one: Any) -> float:
        return ids.size / seconds(lambda: losses[one.name].append(one.train_step(ids)))

    _load_all(everybody, plan)
    for one in everybody:
        one.start_training()
    tasks = {one.name: _bind(once, one) for one in everybody}
    values = interleave(tasks, plan.rounds, warmups=2)
    for one in everybody:
        one.unload()
        found, expected = losses[one.name][:2], losses[everybody[0].name][:2]
        if not np.allclose(found, expected, rtol=plan.loss_tolerance):
            raise AssertionError(f"{one.name}: losses {found}, {everybody[0].name}'s are {expected}")
    batch, length = plan.batch
    return [Result(f"training step of {batch}×{length} tokens", "tokens/s", True, values)]


def _load_all(everybody: list[Any], plan: Plan) -> None:
    for one in everybody:
        one.unload()
        one.load(plan.path)


def _bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


PHASES: dict[str, Callable[[list[Any], Plan], list[Result]]] = {
    "load": load,
    "peak": peak,
    "prefill": prefill,
    "decode": decode,
    "train": train,
}
