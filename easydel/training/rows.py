"""Which rows of a batch the devices of this process hold."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.errors import ShardingError
from easydel.sharding.activations import ROLES


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes of a mesh that split batches."""
    return tuple(axis for axis in ROLES["batch"] if axis in mesh.shape)


def check_rows(rows: int, mesh: Mesh | None) -> None:
    """Refuse batches that the devices do not divide.

    Args:
        rows: of a batch, over all processes.
        mesh: `None` for a single device.

    Raises:
        ShardingError: the devices do not divide the rows.
    """
    axes = () if mesh is None else batch_axes(mesh)
    parts = int(np.prod([mesh.shape[axis] for axis in axes])) if mesh is not None else 1
    if rows % parts:
        raise ShardingError(
            f"a batch of {rows} rows cannot be split over {parts} devices ({'·'.join(axes)}): choose a batch size "
            f"that is a multiple of {parts}, or another mesh"
        )


def own_rows(mesh: Mesh | None, rows: int) -> tuple[int, ...]:
    """Return the numbers of a batch's rows that this process's devices hold; others may hold the same.

    Args:
        mesh: `None` for a single device.
        rows: of a batch, over all processes.

    Raises:
        ShardingError: the devices do not divide the rows.
    """
    if mesh is None:
        return tuple(range(rows))
    check_rows(rows, mesh)
    shares = NamedSharding(mesh, PartitionSpec(batch_axes(mesh))).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({number for share in shares if share for number in range(*share[0].indices(rows))}))
