"""JAX's persistent cache, for tests that compile the same programs again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[Path]:
    """Keep compiled programs in a folder meanwhile."""
    before = {name: getattr(jax.config, name) for name in (*CACHE, "jax_compilation_cache_dir")}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(folder)}).items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
