"""What XLA's compiler says of a training step: the memory it lays out and what it sends between devices."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from easydel.planning.collectives import Moved, collective_bytes
from easydel.planning.step import Setup, Step

WHOLE = 8
"""Layers one by one are compiled as they are up to this depth."""

UNROLLED = 24
"""Beyond this depth nobody waits for layers one by one to be compiled: they are planned in a scan."""

DEPTHS = (6, 8)
"""Between the two, memory is a straight line through these depths: each layer adds the same."""

# How machine code is made of a program, and how good it is, changes neither buffers nor collectives (`tests/planning`
# compares with programs compiled as usual), only how long one waits: a third of the time with these.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@dataclass(frozen=True)
class Measured:
    """A step as compiled for one device of the mesh.

    Attributes:
        arguments: bytes of what it is given, which it overwrites.
        temporaries: bytes of everything else it holds at once: the size of XLA's arena.
        moved: (kind, axes) → bytes of the collectives' results.
        traced: the step as JAX sees it; `None` if other depths were compiled.
    """

    arguments: int
    temporaries: int
    moved: Moved
    traced: Any


def scans(setup: Setup, scan_layers: bool | None) -> bool:
    """Return whether layers are planned in a scan: as asked for, else as the config says unless it is too deep."""
    if scan_layers is not None:
        return scan_layers
    return bool(getattr(setup.config, "scan_layers", False)) or depth(setup.config) > UNROLLED


def depth(config: Any) -> int:
    """Return how many layers a config has, an encoder's and its decoder's together; 0 if it does not say."""
    return (getattr(config, "num_hidden_layers", 0) or 0) + (getattr(config, "num_decoder_layers", 0) or 0)


def measure(setup: Setup, policies: Sequence[str], *, scan: bool) -> dict[str, Measured]:
    """Compile the step under each remat policy, side by side, and read the results.

    Args:
        setup: what the step is made of.
        policies: values of `gradient_checkpointing`.
        scan: whether layers are stored stacked.
    """
    layers = depth(setup.config)
    depths: tuple[int | None, ...] = (None,)
    if not scan and layers > WHOLE and _is_periodic(setup.config):
        depths = DEPTHS
    jobs = [(policy, at) for policy in policies for at in depths]
    found = {}
    # Tracing holds Python's lock and compiling does not: while one step is compiled, the next is traced.
    with _collection_paused(), ThreadPoolExecutor(max_workers=max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        for policy, at in jobs:
            config = setup.config_with(gradient_checkpointing=policy, scan_layers=scan)
            traced = Step(setup, config if at is None else _cut(config, at)).trace()
            found[policy, at] = pool.submit(_compile, setup, traced, traced.lower())
    results = {job: future.result() for job, future in found.items()}
    return {policy: _at_depth([results[policy, at] for at in depths], depths, layers) for policy in policies}


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep Python from looking for garbage: what tracing makes stays, and looking took a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(setup: Setup, traced: Any, lowered: Any) -> Measured:
    compiled = lowered.compile(compiler_options=_OPTIONS)
    memory = compiled.memory_analysis()
    moved = collective_bytes(compiled.as_text(), setup.mesh) if setup.mesh.size > 1 else Counter()
    return Measured(memory.argument_size_in_bytes, memory.temp_size_in_bytes, moved, traced)


def _at_depth(found: Sequence[Measured], depths: Sequence[int | None], layers: int) -> Measured:
    if len(found) == 1:
        return found[0]
    (low, high), (first, last) = depths, found
    times = (layers - high) / (high - low)  # type: ignore[operator]

    def line(before: int, after: int) -> int:
        return round(after + times * (after - before))

    keys: Mapping[tuple[str, str], int] = first.moved | last.moved
    return Measured(
        line(first.arguments, last.arguments),
        line(first.temporaries, last.temporaries),
        Counter({key: line(first.moved[key], last.moved[key]) for key in keys}),
        None,
    )


def _is_periodic(config: Any) -> bool:
    """Whether the layers are of one kind, or of two in turn, and stand in one stack: then each two add the same."""
    kinds = getattr(config, "layer_types", None) or []
    return getattr(config, "num_decoder_layers", None) is None and kinds[2:] == kinds[:-2]


def _cut(config: Any, layers: int) -> Any:
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config
