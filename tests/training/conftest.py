"""Runs of the same shape are compiled once for all tests of training, whatever process they are in."""

from __future__ import annotations

import jax
import pytest

CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory):
    """JAX's persistent cache, in a folder of its own; returns the folder."""
    before = {name: getattr(jax.config, name) for name in (*CACHE, "jax_compilation_cache_dir")}
    folder = tmp_path_factory.mktemp("compiled")
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(folder)}).items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
