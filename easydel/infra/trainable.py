"""Which parameters are trained: chosen by patterns, split off and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from easydel.errors import UnsupportedError
from easydel.paths import flatten, matching, nest
from easydel.stacked import layer_paths

if TYPE_CHECKING:
    from rich.table import Table

Patterns = str | Sequence[str] | None


def frozen_paths(paths: Sequence[str], trainable: Patterns, frozen: Patterns) -> frozenset[str]:
    """Return the paths of parameters that are not trained.

    Args:
        paths: of all parameters, as they are stored.
        trainable: regular expressions; what none is found in is frozen. `None`: all are trained.
        frozen: regular expressions; what one is found in is frozen.

    Raises:
        ValueError: both are given, a pattern matches nothing, or nothing is left to train.
        UnsupportedError: a pattern singles out some layers of those stored stacked.
    """
    if trainable is not None and frozen is not None:
        raise ValueError("give trainable or frozen patterns, not both: each says what the other leaves")
    patterns = trainable if frozen is None else frozen
    if patterns is None:
        return frozenset()
    layers = {path: layer_paths(path) or [path] for path in paths}
    every = [layer for names in layers.values() for layer in names]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found.update(matching(pattern, every, what="parameter"))
    chosen = {path for path, names in layers.items() if found.issuperset(names)}
    for path, names in layers.items():
        if path not in chosen and not found.isdisjoint(names):
            picked = sorted(found.intersection(names))
            raise UnsupportedError(
                f"{path}: freezing some of the layers that are stored stacked is not supported ({picked[0]} is meant, "
                f"but not all of them): build the model with scan_layers=False, or choose all of its layers"
            )
    kept = set(paths) - chosen if frozen is None else chosen
    if kept == set(paths):
        raise ValueError(f"frozen={frozen!r} leaves no parameter to train; freeze fewer of them")
    return frozenset(kept)


def frozen_with_adapters(
    paths: Sequence[str], adapters: frozenset[str], trainable: Patterns, frozen: Patterns
) -> frozenset[str]:
    """Return the paths of parameters that are not trained, of a model with adapters.

    Its base is not trained unless `trainable` says so. Arguments and errors as of `frozen_paths`; `adapters`: the paths
    of the adapters' parameters.
    """
    kept = frozen_paths(paths, trainable, frozen)
    if not adapters or trainable is not None:
        return kept
    kept |= set(paths) - adapters
    if kept == set(paths):
        raise ValueError(f"frozen={frozen!r} leaves no adapter to train; freeze fewer of them")
    return kept


def choose(params: Mapping[str, Any], paths: frozenset[str], *, inside: bool) -> dict[str, Any]:
    """Return the part of a nested dict of parameters whose paths are, or are not, among `paths`."""
    flat = flatten(params, by_layer=False)
    return nest({path: leaf for path, leaf in flat.items() if (path in paths) is inside})


@dataclass(frozen=True)
class TrainableSummary:
    """How much of a model is trained; `str()` says it in a line.

    Attributes:
        trainable: parameters that are trained.
        total: all parameters.
        optimizer_bytes: what the optimizer keeps for them, over all devices, each array counted once.
        groups: of parameters that differ in their layer only: pattern → (count, of them trained).
    """

    trainable: int
    total: int
    optimizer_bytes: int
    groups: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        from easydel.sharding.explain_text import bytes_text

        return (
            f"trainable parameters: {self.trainable:,} of {self.total:,} ({100 * self.trainable / self.total:.4g} %); "
            f"optimizer state {bytes_text(self.optimizer_bytes)}"
        )

    def table(self) -> Table:
        """Return the groups as a `rich` table."""
        from rich.table import Table

        table = Table(title=str(self), title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name, side in (("parameter", "left"), ("all", "right"), ("trained", "right")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for pattern, (count, trained) in self.groups.items():
            table.add_row(pattern, f"{count:,}", f"{trained:,}", style=None if trained else "dim")
        return table


def summarize(params: Mapping[str, Any], frozen: frozenset[str], optimizer_bytes: int) -> TrainableSummary:
    """Count parameters, and those of them that are trained."""
    from easydel.sharding.explain_text import over_layers

    groups: dict[str, tuple[int, int]] = {}
    for path, leaf in flatten(params, by_layer=False).items():
        size = math.prod(leaf.shape)
        count, trained = groups.get(over_layers(path), (0, 0))
        groups[over_layers(path)] = (count + size, trained + (0 if path in frozen else size))
    total, trainable = (sum(pair[side] for pair in groups.values()) for side in (0, 1))
    return TrainableSummary(trainable, total, optimizer_bytes, groups)
