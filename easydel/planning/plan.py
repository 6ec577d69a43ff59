"""`Plan`: what a training step takes on each device of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Plan:
    """What a training step takes; `str()` shows it.

    Attributes:
        model: name of the class.
        axes: name → size of each axis of the mesh.
        batch_size: rows of a batch, over all devices.
        sequence_length: tokens of a row.
        dtype: name, of the computation.
        param_dtype: name, of the stored parameters.
        remat: the remat policy that is planned for; the others stand beside it.
        scan_layers: whether layers are stored stacked and run by a scan.
        parameters: how many there are, each shared one once.
        bytes_per_device: `parameters`, `gradients`, `optimizer`, `inputs` (the batch, and state that is no parameter),
            `activations` (remat policy → bytes), `cache` (of generation, not part of a step) and `total` (remat policy
            → bytes of a step).
        flops_per_step: matrix products on all devices together: `forward`, `backward`, `recomputation` (remat policy →
            FLOPs) and `total` (remat policy → FLOPs).
        collective_bytes_per_step: kind (`all_gather`, `all_reduce`, …) → axes (`"fsdp"`, `"dp+fsdp"`) → bytes of the
            results on one device, under `remat`.
        notes: what should be known when reading it.
    """

    model: str
    axes: Mapping[str, int]
    batch_size: int
    sequence_length: int
    dtype: str
    param_dtype: str
    remat: str
    scan_layers: bool
    parameters: int
    bytes_per_device: Mapping[str, Any]
    flops_per_step: Mapping[str, Any]
    collective_bytes_per_step: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()

    @property
    def total_bytes_per_device(self) -> int:
        """Bytes of a step on each device under the policy that is planned for."""
        return self.bytes_per_device["total"][self.remat]

    def fits(self, memory: int, remat: str | None = None) -> bool:
        """Whether a step fits into `memory` bytes on each device, under a policy other than the plan's if given."""
        return self.bytes_per_device["total"][remat or self.remat] <= memory

    def table(self) -> Table:
        """Return it as a `rich` table."""
        from easydel.planning.report import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        from easydel.planning.report import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what `json` can write."""
        from easydel.planning.report import plain

        return plain(self)
