"""Partition rules: which parameter is split over which mesh axes.

A rule is `(regex, PartitionSpec)`. The regex is searched (`re.search`) in the parameter's path, the
first rule that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from easydel.errors import ShardingError
from easydel.paths import named_modules, named_variables
from easydel.stacked import layer_of, layer_paths

PartitionRules = Sequence[tuple[str, PartitionSpec]]


@dataclass(frozen=True)
class RuleMatch:
    """The rule that decides over a parameter.

    Attributes:
        index: its position in the rules; `None` for a scalar, which needs no rule.
        pattern: its regular expression.
        spec: what it asks for, of a stack of layers behind a `None` for the layers.
        is_stack: whether the parameter is such a stack.
    """

    index: int | None
    pattern: str | None
    spec: PartitionSpec
    is_stack: bool = False

    def __str__(self) -> str:
        asked = layer_of(self.spec, 0) if self.is_stack else self.spec
        return "no rule" if self.index is None else f"rules[{self.index}] ({self.pattern!r}, {asked})"

    def of_stack(self) -> RuleMatch:
        """Return what the rule of each layer makes of their stack."""
        return RuleMatch(self.index, self.pattern, PartitionSpec(None, *self.spec), is_stack=True)


def match_rules(rules: PartitionRules, shapes: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Choose a spec for every parameter; see `find_matches`."""
    return {path: match.spec for path, match in find_matches(rules, shapes).items()}


def find_matches(rules: PartitionRules, shapes: Mapping[str, Any]) -> dict[str, RuleMatch]:
    """Find the rule that decides over each parameter.

    Args:
        rules: `(regex, PartitionSpec)` pairs.
        shapes: path → anything with a `.shape`; of layers stored stacked, the path of the stack and its shape.

    Returns:
        path → the first rule that matches; scalars get `PartitionSpec()` without a rule. Rules speak of each layer; a
        stack of layers gets their spec behind a `None` for the layers, and the rule of its first layer.

    Raises:
        ShardingError: a broken regex, a parameter that no rule matches, a spec longer than the parameter's rank, or
            layers of one stack that are to be split differently. All offenders are listed together.
    """
    compiled = compile_rules(rules)
    matches: dict[str, RuleMatch] = {}
    problems: list[str] = []
    for path, leaf in shapes.items():
        layers = layer_paths(path)
        shape = tuple(leaf.shape) if layers is None else tuple(leaf.shape[1:])
        if not shape:
            matches[path] = RuleMatch(None, None, PartitionSpec())
            continue
        found: dict[PartitionSpec, tuple[str, RuleMatch]] = {}  # one spec, but for layers that differ
        missed = len(problems)
        for layer in layers or [path]:
            match = _first_match(compiled, layer)
            if match is None:
                problems.append(f"{layer} {shape}: no rule matches; add one, or end the rules with ('.*', P())")
                continue
            if len(match.spec) > len(shape):
                problems.append(
                    f"{layer} {shape}: {match} is longer than the parameter's {len(shape)} dimension(s); "
                    "shorten the spec, or put a rule for this parameter before it"
                )
            found.setdefault(match.spec, (layer, match))
        if len(problems) > missed:
            continue
        if len(found) > 1:
            problems.append(_differing(list(found.values())))
        first = next(iter(found.values()))[1]
        matches[path] = first if layers is None else first.of_stack()
    if problems:
        raise ShardingError("partition rules do not fit the parameters:\n  " + summary(problems))
    return matches


def _first_match(compiled: Sequence[tuple[re.Pattern[str], PartitionSpec]], path: str) -> RuleMatch | None:
    found = ((i, regex.pattern, spec) for i, (regex, spec) in enumerate(compiled) if regex.search(path))
    return next((RuleMatch(*match) for match in found), None)


def _differing(found: Sequence[tuple[str, RuleMatch]]) -> str:
    (layer, match), (other, different) = found[:2]
    return (
        f"{layer}: gets {match}, but {other} gets {different}; layers that are stored stacked (scan_layers=True) are "
        "split alike: write rules that do not tell them apart, or set scan_layers=False"
    )


def summary(lines: Sequence[str], shown: int = 20) -> str:
    """Join the lines of a message, the first of them if there are many."""
    more = [f"… and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n  ".join([*lines[:shown], *more])


def compile_rules(rules: PartitionRules) -> list[tuple[re.Pattern[str], PartitionSpec]]:
    """Check and compile rules.

    Raises:
        ShardingError: something else than pairs of a regular expression and a `PartitionSpec`; it says which.
    """
    if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
        raise ShardingError(f"partition rules: expected (regex, PartitionSpec) pairs, got {type(rules).__name__}")
    return [_compile(f"rules[{index}] {rule!r}", rule) for index, rule in enumerate(rules)]


def _compile(where: str, rule: Any) -> tuple[re.Pattern[str], PartitionSpec]:
    try:
        pattern, spec = rule
        regex = re.compile(pattern)
    except re.error as error:
        raise ShardingError(
            f"partition {where}: not a regular expression: {error}; put a backslash before a character meant literally"
        ) from error
    except (TypeError, ValueError) as error:
        raise ShardingError(f"partition {where}: expected a (regex, PartitionSpec) pair") from error
    if not isinstance(spec, PartitionSpec):
        raise ShardingError(
            f"partition {where}: expected a PartitionSpec, got {type(spec).__name__}; write "
            "jax.sharding.PartitionSpec('fsdp', 'tp')"
        )
    return regex, spec


def infer_rules(module: nnx.Module) -> list[tuple[str, PartitionSpec]]:
    """Derive rules from the layers of a module that has none.

    Linear kernels are split `(fsdp, tp)`, embedding tables `(tp, fsdp)`, whatever else (norms, biases) is replicated.
    """
    rules = []
    shapes = {path: variable.shape for path, variable in named_variables(module, nnx.Param).items()}
    for path, layer in named_modules(module).items():
        kernel = shapes.get(f"{path}/kernel" if path else "kernel", ())
        prefix = f"^{re.escape(path)}/" if path else "^"
        if isinstance(layer, nnx.Linear):
            rules.append((prefix + "kernel$", PartitionSpec("fsdp", "tp")))
        elif isinstance(layer, nnx.Embed):
            rules.append((prefix + "embedding$", PartitionSpec("tp", "fsdp")))
        elif isinstance(layer, nnx.LinearGeneral | nnx.Einsum | nnx.Conv) and len(kernel) > 1:
            unsharded = (None,) * (len(kernel) - 2)
            rules.append((prefix + "kernel$", PartitionSpec(*unsharded, "fsdp", "tp")))
        elif (spec := getattr(layer, "inferred_spec", None)) is not None:  # what was such a layer, quantized
            rules.append((prefix + "kernel$", spec))
    return [*rules, (".*", PartitionSpec())]
