"""Partition rules: which parameter is split over which mesh axes.

A rule is `(regex, PartitionSpec)`. The regex is searched (`re.search`) in the parameter's path, the
first rule that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec

from easydel.errors import ShardingError
from easydel.paths import named_modules

PartitionRules = Sequence[tuple[str, PartitionSpec]]


def match_rules(rules: PartitionRules, shapes: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Choose a spec for every parameter.

    Args:
        rules: `(regex, PartitionSpec)` pairs.
        shapes: path → anything with a `.shape`.

    Returns:
        path → the spec of the first rule that matches; scalars get `PartitionSpec()` without a rule.

    Raises:
        ShardingError: a broken regex, a parameter that no rule matches, or a spec longer than the parameter's rank.
            All offenders are listed together.
    """
    compiled = _compile(rules)
    specs, problems = {}, []
    for path, leaf in shapes.items():
        if not leaf.shape:
            specs[path] = PartitionSpec()
            continue
        rule = next(((regex.pattern, spec) for regex, spec in compiled if regex.search(path)), None)
        if rule is None:
            problems.append(f"{path} {tuple(leaf.shape)}: no rule matches; add one, or end the rules with ('.*', P())")
        elif len(rule[1]) > len(leaf.shape):
            problems.append(
                f"{path} {tuple(leaf.shape)}: rule {rule[0]!r} gives {rule[1]}, longer than the parameter's "
                f"{len(leaf.shape)} dimension(s)"
            )
        else:
            specs[path] = rule[1]
    if problems:
        raise ShardingError("partition rules do not fit the parameters:\n  " + "\n  ".join(problems))
    return specs


def _compile(rules: PartitionRules) -> list[tuple[re.Pattern[str], PartitionSpec]]:
    compiled = []
    for rule in rules:
        try:
            pattern, spec = rule
            regex = re.compile(pattern)
        except re.error as error:
            raise ShardingError(f"partition rule {rule!r}: not a regular expression: {error}") from error
        except (TypeError, ValueError) as error:
            raise ShardingError(f"partition rule {rule!r}: expected a (regex, PartitionSpec) pair") from error
        if not isinstance(spec, PartitionSpec):
            raise ShardingError(f"partition rule {rule!r}: expected a PartitionSpec, got {type(spec).__name__}")
        compiled.append((regex, spec))
    return compiled


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
