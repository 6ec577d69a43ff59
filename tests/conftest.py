"""Eight simulated CPU devices and no network for every test, and no more compiled programs than a process can hold."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

# Tiny programs: most of the time goes into compiling them, and without LLVM's optimisations that takes half as long.
# What XLA itself does to a program stays the same.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A compiled model takes some hundred memory maps. Linux allows a process 65,530; beyond them the compiler aborts.
MAPS, MOST_MAPS, LOOK_EVERY = Path("/proc/self/maps"), 40_000, 16
finished = itertools.count(1)


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
