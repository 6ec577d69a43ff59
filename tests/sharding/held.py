"""How many bytes each device holds, and tiny models of every family to hold them."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import easydel
from easydel.infra.construct import abstract_module
from easydel.paths import named_variables
from easydel.sharding import create_mesh
from tests.models.table import FAMILIES

MESHES = {
    "fsdp": (1, 8, 1, 1, 1),
    "mixed": (2, 2, 1, 2, 1),
    "tp": (1, 2, 1, 4, 1),
    "dp": (8, 1, 1, 1, 1),
    "experts": (1, 2, 2, 2, 1),
    "sequence": (1, 2, 1, 2, 2),
    "five": (1, 5, 1, 1, 1),
    "six": (1, 3, 1, 2, 1),
}


ONE_OF_A_KIND = ("llama", "gpt2", "mamba2", "mixtral", "bert", "t5")
"""Families of other parts than each other's; those that are like Llama are slow here."""


def one_of_a_kind() -> list[Any]:
    """Return every family's name as a test's parameter, with its marks."""
    return [pytest.param(name, marks=[] if name in ONE_OF_A_KIND else pytest.mark.slow) for name in FAMILIES]


def mesh_named(name: str) -> Mesh:
    count = {"five": 5, "six": 6}.get(name, 8)
    return create_mesh(MESHES[name], devices=jax.devices()[:count])


def family(name: str) -> tuple[Any, Any]:
    """Return class and config of a family's main task, dropout on, so that there is state besides parameters."""
    row = FAMILIES[name]
    cls = getattr(easydel, row.class_name(row.main_task, "ours"))
    return cls, cls.config_class(**row.tiny(dict.fromkeys(row.dropout, 0.1)))


def zeros(cls: Any, config: Any) -> Any:
    """Return a model of real arrays for which nothing was compiled."""
    model = abstract_module(cls, config)
    for variable in named_variables(model, by_layer=False).values():
        shape = variable.get_value()
        is_key = jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
        value = jax.random.split(jax.random.key(0), shape.shape) if is_key else np.zeros(shape.shape, shape.dtype)
        variable.set_value(jax.device_put(value))
    return model


def bits(array: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array)


def held(model: nnx.Module) -> dict[int, int]:
    """Return device → bytes of a model's arrays there."""
    counts: Counter[int] = Counter()
    for leaf in jax.tree.leaves(nnx.state(model)):
        for shard in leaf.addressable_shards:
            counts[shard.device.id] += shard.data.nbytes
    return dict(counts)


def live(arrays: Iterable[jax.Array] | None = None) -> Counter[int]:
    """Return device → bytes that are alive there, memory that arrays share counted once."""
    buffers: dict[tuple[int, int], int] = {}
    for array in jax.live_arrays() if arrays is None else arrays:
        for shard in array.addressable_shards:
            buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    counts: Counter[int] = Counter()
    for (device, _), size in buffers.items():
        counts[device] += size
    return counts


class Peak:
    """The most that each device held in a block, over what it held before."""

    def __init__(self) -> None:
        gc.collect()
        self._before, self.bytes, self.samples = live(), Counter[int](), 0

    def sample(self) -> None:
        for device, size in live().items():
            self.bytes[device] = max(self.bytes[device], size - self._before[device])
        self.samples += 1


@contextmanager
def measured(monkeypatch: Any, module: Any, *names: str) -> Iterator[Peak]:
    """Measure a block: after each call of the named functions of a module, and all the while from a thread."""
    peak, done = Peak(), threading.Event()

    def sampling(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            peak.sample()
            return result

        return wrapped

    def watch() -> None:
        while not done.wait(0.005):
            try:
                peak.sample()
            except RuntimeError:  # an array was deleted between being listed and being looked at
                continue

    watcher = threading.Thread(target=watch)
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(module, name, sampling(getattr(module, name)))
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()
    peak.sample()
