"""Processes find one another and compute together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import run


def summed_over_all() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from easydel import distributed
    from easydel.sharding import create_mesh

    mesh = create_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    x = jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8.0, dtype=np.float32)[index])
    total = jax.jit(jnp.sum)(x)
    return {"first": distributed.is_first(), "devices": mesh.size, "total": float(total)}


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_all_devices_of_all_processes_take_part(processes: int, devices: int) -> None:
    found = run(summed_over_all, processes, devices)
    assert [one["first"] for one in found] == [True] + [False] * (processes - 1)
    assert {one["devices"] for one in found} == {8}
    assert {one["total"] for one in found} == {28.0}
