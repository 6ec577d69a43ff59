"""A mesh of simulated devices: XLA compiles for them, nothing is ever run on them."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from easydel.errors import UnsupportedError
from easydel.sharding import AnyMesh

MOST_DEVICES = 2048
"""Each simulated device costs a thread; a process that cannot start one is aborted by XLA."""


def simulated_mesh(mesh: AnyMesh) -> Mesh:
    """Return a mesh of the same axes over simulated CPU devices, beside whatever devices are really here.

    Raises:
        UnsupportedError: there are more devices than can be simulated.
    """
    most = _most_devices()
    if mesh.size > most:
        axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
        raise UnsupportedError(
            f"mesh {axes} has {mesh.size} devices, at most {most} can be simulated here: plan with fewer on dp and a "
            "batch smaller by the same factor, which leaves the bytes of a device as they are"
        )
    devices = np.array(_devices(mesh.size)).reshape(tuple(mesh.shape.values()))
    return Mesh(devices, tuple(mesh.shape), axis_types=(AxisType.Auto,) * devices.ndim)


@functools.lru_cache(maxsize=8)
def _devices(count: int) -> tuple[Any, ...]:
    # JAX's own number of simulated devices is fixed once it has started, and tests, notebooks and training have
    # started it. A client of its own leaves `jax.devices()` alone.
    from jaxlib import xla_client

    client: Any = xla_client.make_cpu_client(num_devices=count)
    return tuple(client.devices())


def _most_devices() -> int:
    if sys.platform == "win32":
        return MOST_DEVICES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return MOST_DEVICES if soft in (resource.RLIM_INFINITY, -1) else min(MOST_DEVICES, max(1, math.floor(soft / 4)))
