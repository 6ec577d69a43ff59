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
from easydel.paths import named_modules

PartitionRules = Sequence[tuple[str, PartitionSpec]]


@dataclass(frozen=True)
class RuleMatch:
    """The rule that decides over a parameter.

    Attributes:
        index: its position in the rules; `None` for a scalar, which needs no rule.
        pattern: its regular expression.
        spec: what it asks for.
    """

    index: int | None
    pattern: str | None
    spec: PartitionSpec

    def __str__(self) -> str:
        return "no rule" if self.index is None else f"rules[{self.index}] ({self.pattern!r}, {self.spec})"


def match_rules(rules: PartitionRules, shapes: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Choose a spec for every parameter; see `find_matches`."""
    return {path: match.spec for path, match in find_matches(rules, shapes).items()}


def find_matches(rules: PartitionRules, shapes: Mapping[str, Any]) -> dict[str, RuleMatch]:
    """Find the rule that decides over each parameter.

    Args:
        rules: `(regex, PartitionSpec)` pairs.
        shapes: path → anything with a `.shape`.

    Returns:
        path → the first rule that matches; scalars get `PartitionSpec()` without a rule.

    Raises:
        ShardingError: a broken regex, a parameter that no rule matches, or a spec longer than the parameter's rank.
            All offenders are listed together.
    """
    compiled = compile_rules(rules)
    matches: dict[str, RuleMatch] = {}
    problems = []
    for path, leaf in shapes.items():
        if not leaf.shape:
            matches[path] = RuleMatch(None, None, PartitionSpec())
            continue
        found = next(((i, spec) for i, (regex, spec) in enumerate(compiled) if regex.search(path)), None)
        if found is None:
            problems.append(f"{path} {tuple(leaf.shape)}: no rule matches; add one, or end the rules with ('.*', P())")
            continue
        match = matches[path] = RuleMatch(found[0], compiled[found[0]][0].pattern, found[1])
        if len(match.spec) > len(leaf.shape):
            problems.append(
                f"{path} {tuple(leaf.shape)}: {match} is longer than the parameter's {len(leaf.shape)} dimension(s); "
                "shorten the spec, or put a rule for this parameter before it"
            )
    if problems:
        raise ShardingError("partition rules do not fit the parameters:\n  " + summary(problems))
    return matches


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
    for path, layer in named_modules(module).items():
        prefix = f"^{re.escape(path)}/" if path else "^"
        if isinstance(layer, nnx.Linear):
            rules.append((prefix + "kernel$", PartitionSpec("fsdp", "tp")))
        elif isinstance(layer, nnx.Embed):
            rules.append((prefix + "embedding$", PartitionSpec("tp", "fsdp")))
        elif isinstance(layer, nnx.LinearGeneral | nnx.Einsum | nnx.Conv) and len(layer.kernel.shape) > 1:
            unsharded = (None,) * (len(layer.kernel.shape) - 2)
            rules.append((prefix + "kernel$", PartitionSpec(*unsharded, "fsdp", "tp")))
    return [*rules, (".*", PartitionSpec())]
