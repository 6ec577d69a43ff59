"""Tables for people: parameters grouped over layers, sizes with units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from easydel.paths import flatten
from easydel.sharding.explain_text import bytes_text, over_layers, spec_text

__all__ = ["ParameterGroup", "bytes_text", "count_text", "group_parameters", "parameter_table", "spec_text"]


@dataclass
class ParameterGroup:
    """Parameters that differ only in their layer: `model/layers/*/mlp/up_proj/kernel`."""

    pattern: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    count: int = 0

    @property
    def size(self) -> int:
        """Elements of all members."""
        return self.count * math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all members."""
        return self.size * np.dtype(self.dtype).itemsize


def group_parameters(arrays: Mapping[str, Any], specs: Mapping[str, Any]) -> list[ParameterGroup]:
    """Group parameters over layers.

    Args:
        arrays: nested dictionary of arrays or `jax.ShapeDtypeStruct`.
        specs: nested dictionary of `PartitionSpec` with the same paths.

    Returns:
        The groups, in the order of their first member.
    """
    flat_specs = flatten(specs)
    groups: dict[tuple[Any, ...], ParameterGroup] = {}
    for path, array in flatten(arrays).items():
        pattern = over_layers(path)
        key = (pattern, tuple(array.shape), str(array.dtype), spec_text(flat_specs.get(path)))
        groups.setdefault(key, ParameterGroup(*key)).count += 1
    return list(groups.values())


def parameter_table(groups: list[ParameterGroup], title: str | None = None) -> Table:
    """Lay groups out with a line of totals."""
    table = Table(title=title, title_justify="left", show_footer=True, header_style="bold", box=None, pad_edge=False)
    size, memory = sum(group.size for group in groups), sum(group.bytes for group in groups)
    table.add_column("parameter", "total", overflow="fold")
    table.add_column("×", str(sum(group.count for group in groups)), justify="right")
    table.add_column("shape")
    table.add_column("dtype")
    table.add_column("split over")
    table.add_column("parameters", count_text(size), justify="right")
    table.add_column("memory", bytes_text(memory), justify="right")
    for group in groups:
        shape = " × ".join(map(str, group.shape))
        table.add_row(
            group.pattern, str(group.count), shape, group.dtype, group.spec, count_text(group.size),
            bytes_text(group.bytes),
        )  # fmt: skip
    return table


def count_text(count: float) -> str:
    """Return a number in three digits: `4.14 M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"
