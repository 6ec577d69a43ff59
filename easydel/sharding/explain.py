"""What partition rules make of a model on a mesh, worked out from shapes: nothing is allocated or moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.errors import ShardingError
from easydel.sharding.mesh import AnyMesh, check_mesh
from easydel.sharding.placement import DroppedAxis, FitReport, fit_spec
from easydel.sharding.rules import PartitionRules, RuleMatch, compile_rules, find_matches, summary
from easydel.stacked import layer_paths

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Placement:
    """Where an array goes, and why.

    Attributes:
        path: of the array, as it is stored: equal layers that are stored stacked have one.
        shape: of the whole of it.
        dtype: its name.
        rule: position of the rule that decides, of layers stored stacked that of the first; `None` for a scalar, or for
            state that is no parameter.
        pattern: of that rule.
        requested: the spec that the rule asks for.
        actual: the spec it gets.
        dropped: the axes between the two, with the reason.
        bytes: of the whole array.
        bytes_per_device: of the part that each device of the mesh holds.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    rule: int | None
    pattern: str | None
    requested: PartitionSpec
    actual: PartitionSpec
    dropped: tuple[DroppedAxis, ...]
    bytes: int
    bytes_per_device: int


@dataclass(frozen=True)
class RuleUse:
    """What a rule does; of layers stored stacked, each layer's parameter counts.

    Attributes:
        index: its position.
        pattern: its regular expression.
        spec: what it asks for.
        chosen: how many parameters it decides over.
        matching: how many its pattern is found in.
        behind: position of an earlier rule → how many of the matching parameters that one takes.
    """

    index: int
    pattern: str
    spec: PartitionSpec
    chosen: int
    matching: int
    behind: tuple[tuple[int, int], ...] = ()

    @property
    def is_dead(self) -> bool:
        """Whether its pattern is found in no parameter."""
        return not self.matching

    @property
    def is_shadowed(self) -> bool:
        """Whether it matches parameters, but earlier rules take them all."""
        return bool(self.matching) and not self.chosen


@dataclass(frozen=True)
class ShardingExplanation:
    """What partition rules make of a model on a mesh; `str()` shows it, `save()` draws it.

    Attributes:
        axes: name and size of each axis of the mesh.
        device_ids: of the mesh's devices, in its order; of a mesh that is not here, positions.
        parameters: one `Placement` each.
        state: likewise, everything else that takes memory; every device holds all of it.
        rules: one `RuleUse` each.
    """

    axes: tuple[tuple[str, int], ...]
    device_ids: tuple[int, ...]
    parameters: tuple[Placement, ...]
    state: tuple[Placement, ...]
    rules: tuple[RuleUse, ...]

    def __getitem__(self, path: str) -> Placement:
        for row in (*self.parameters, *self.state):
            if row.path == path:
                return row
        raise KeyError(path)

    @property
    def bytes(self) -> int:
        """Bytes of the whole model, each array counted once."""
        return sum(row.bytes for row in (*self.parameters, *self.state))

    @property
    def bytes_per_device(self) -> dict[int, int]:
        """Device → the bytes it holds. An axis that does not divide is dropped, so devices never differ."""
        held = sum(row.bytes_per_device for row in (*self.parameters, *self.state))
        return dict.fromkeys(self.device_ids, held)

    @property
    def fullest_device(self) -> tuple[int, int]:
        """The (first) device that holds most, and its bytes."""
        return max(self.bytes_per_device.items(), key=lambda item: item[1])

    @property
    def dropped(self) -> tuple[DroppedAxis, ...]:
        """Every axis that a parameter could not have."""
        return tuple(axis for row in self.parameters for axis in row.dropped)

    @property
    def dead_rules(self) -> tuple[RuleUse, ...]:
        """Rules whose pattern is found in no parameter."""
        return tuple(rule for rule in self.rules if rule.is_dead)

    @property
    def shadowed_rules(self) -> tuple[RuleUse, ...]:
        """Rules that match parameters, all of which earlier rules take."""
        return tuple(rule for rule in self.rules if rule.is_shadowed)

    def table(self) -> Table:
        """Return the parameters as a `rich` table, those that differ only in their layer in one line."""
        from easydel.sharding.explain_text import parameter_table

        return parameter_table(self)

    def __str__(self) -> str:
        from easydel.sharding.explain_text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what `json` can write."""
        from easydel.sharding.explain_text import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> None:
        """Draw which part of each parameter lies on which device.

        Args:
            path: `.html` (one file that needs nothing else) or `.png` (needs the `plot` extra).

        Raises:
            ValueError: another suffix.
            ImportError: a PNG, and matplotlib is not installed.
        """
        from easydel.sharding.explain_picture import save_picture

        save_picture(self, Path(path))


def explain_rules(
    rules: PartitionRules,
    parameters: Mapping[str, Any],
    mesh: AnyMesh,
    state: Mapping[str, Any] | None = None,
    derived: Mapping[str, tuple[Any, str, RuleMatch]] | None = None,
) -> ShardingExplanation:
    """Work out what rules make of parameters on a mesh.

    Args:
        rules: `(regex, PartitionSpec)` pairs.
        parameters: path → anything with a shape and a dtype.
        mesh: a mesh, which need not exist here.
        state: likewise, what is no parameter.
        derived: path → what stands in place of a parameter, the parameter's path and what its rule makes of it here;
            told among the parameters.

    Raises:
        ShardingError: the rules do not fit the parameters or the mesh.
    """
    check_mesh(mesh)
    derived = derived or {}
    matches = find_matches(rules, parameters) | {path: match for path, (_, _, match) in derived.items()}
    rows, problems = [], []
    for path, leaf in ({**parameters} | {path: leaf for path, (leaf, _, _) in derived.items()}).items():
        try:
            rows.append(_placement(path, leaf, matches[path], mesh))
        except ShardingError as error:
            problems.append(str(error))
    if problems:
        raise ShardingError("partition rules do not fit the mesh:\n  " + summary(problems))
    whole = RuleMatch(None, None, PartitionSpec())
    others = [_placement(path, leaf, whole, mesh) for path, leaf in (state or {}).items()]
    ids = [device.id for device in mesh.devices.flat] if isinstance(mesh, Mesh) else range(mesh.size)
    decided = [path for path, match in matches.items() if match.index is not None and path not in derived]
    origins = dict.fromkeys(origin for _, origin, match in derived.values() if match.index is not None)
    decided += [origin for origin in origins if origin not in matches]
    paths = [layer for path in decided for layer in layer_paths(path) or [path]]
    return ShardingExplanation(
        axes=tuple(mesh.shape.items()),
        device_ids=tuple(ids),
        parameters=tuple(rows),
        state=tuple(others),
        rules=tuple(_rule_uses(rules, paths)),
    )


def _placement(path: str, leaf: Any, match: RuleMatch, mesh: AnyMesh) -> Placement:
    shape, report = tuple(leaf.shape), FitReport()
    actual = fit_spec(match.spec, shape, mesh, path=path, report=report, rule=match)
    part = NamedSharding(mesh, actual).shard_shape(shape)
    size = leaf.dtype.itemsize
    return Placement(
        path=path,
        shape=shape,
        dtype=str(leaf.dtype),
        rule=match.index,
        pattern=match.pattern,
        requested=match.spec,
        actual=actual,
        dropped=tuple(report.dropped),
        bytes=math.prod(shape) * size,
        bytes_per_device=math.prod(part) * size,
    )


def _rule_uses(rules: PartitionRules, paths: Iterable[str]) -> list[RuleUse]:
    paths, uses = list(paths), []
    winners: dict[str, int] = {}
    for index, (regex, spec) in enumerate(compile_rules(rules)):
        found = [winners.setdefault(path, index) for path in paths if regex.search(path)]
        earlier = sorted({winner for winner in found if winner != index})
        behind = tuple((winner, found.count(winner)) for winner in earlier)
        uses.append(RuleUse(index, regex.pattern, spec, found.count(index), len(found), behind))
    return uses
