"""Eight simulated CPU devices and no network for every test, and no more compiled programs than a process can hold."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

# Tiny programs: most of the time goes into compiling them. Without LLVM's optimisations, with XLA's plain emitter of
# loops and each program in one piece that takes a quarter as long. What is computed stays the same, and with it what
# XLA does before there is machine code. XLA_FLAGS has the last word on this (CONTRIBUTING.md has an example).
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
DEVICES = "--xla_force_host_platform_device_count=8"

os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')} {DEVICES}"  # the last of two counts
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads where a traced operation was written
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A compiled model takes some hundred memory maps. Linux allows a process 65,530; beyond them the compiler aborts.
# Twenty thousand go with about 4 GB.
MAPS, MOST_MAPS, LOOK_EVERY = Path("/proc/self/maps"), 20_000, 16
finished = itertools.count(1)

# Tracing makes many small objects beside the hundreds of thousands of JAX's and torch's, which a collection walks each
# time: an eighth of all time with Python's own thresholds.
gc.set_threshold(200_000, 20, 100)


def pytest_runtest_teardown() -> None:
    """Let compiled programs go before there are too many; what is needed again is compiled again."""
    if next(finished) % LOOK_EVERY or not MAPS.exists():
        return
    with MAPS.open() as lines:
        many = sum(1 for _ in lines) > MOST_MAPS
    if many:
        import jax  # not before the settings above

        jax.clear_caches()
        gc.collect()
