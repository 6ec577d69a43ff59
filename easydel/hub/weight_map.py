"""The weight map: which tensors of a checkpoint make which variables, as one table used both ways.

The table is always derived from the *module*: each variable asks the rules, in order, for its names, and a rule-less
variable gets the plain name: `/` becomes `.`, a matrix `kernel` becomes `weight` transposed, a convolution's `kernel`
`[*k, in, out]` becomes `weight` `[out, in, *k]`, `embedding` and `scale` become `weight`, and everything else
(kernels of other ranks too) keeps its name and layout. A module in which two plain names would collide keeps its own
leaf names there. So the way back is the same table read backwards, never a guess from a file's names.

A module class may declare, all optional and also on submodules (their names are then relative to the submodule):
`weight_map: tuple[WeightRule, ...]` (a property, where names or layouts depend on the config),
`base_model_prefix: str`, `harmless_extras: tuple[str, ...]` (regular expressions of checkpoint names to ignore),
`legacy_names: tuple[(pattern, replacement), ...]` (`re.sub` of names in older checkpoints, before anything else) and
`tied_names() -> dict[name, name]`.
Where transformers' model in memory has other tensors than its files, rules name the *form* they belong to: the first
form that any rule names (`"file"`) is what saving writes, `"memory"` is what `to_torch` gives, and loading takes, for
each group of variables, the form that the file holds (`forms.py`).
A variable with metadata `persistent=False` belongs to no file; one whose type has `must_load = True` is
required in a file even though it is no parameter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from easydel.hub.transforms import IDENTITY, TRANSPOSE, Permute, Shape, Split, Stack, Transform
from easydel.paths import named_modules, named_variables
from easydel.stacked import Held, kind_of

LEAVES = {"embedding": "weight", "scale": "weight"}
VOLATILE = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)
PLACEHOLDER = re.compile(r"\\?\{(\w+)\\?\}")


@dataclass(frozen=True)
class WeightRule:
    """One line of a weight map: names in the file (`.`) ↔ paths in the module (`/`).

    `{i}` stands for one segment. A rule matches the *end* of a path, at a segment boundary; what comes before follows
    the other rules. With `transform=None` it is a rename of a module: it matches anywhere, and the leaf stays plain; an
    empty source leaves out a module that stands first.
    All renames that match are applied, in order.
    A placeholder that only the source has counts along the target's leading axis (`Stack`).

    Attributes:
        source: checkpoint name, or several.
        target: path, or several (a fused tensor split over them).
        transform: how arrays change between the two.
        form: the form of checkpoint that has these names; `None`: all.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    transform: Transform | None = IDENTITY
    form: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def targets(self) -> tuple[str, ...]:
        """`target` as a tuple."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True)
class Link:
    """One resolved line: these tensors of the file are these variables of the module.

    `source_dtypes` are those of the tensors where a transform changes them; `None`: the first variable's.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform
    source_shapes: tuple[Shape, ...]
    target_shapes: tuple[Shape, ...]
    source_dtypes: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Scoped:
    scope: str
    rule: WeightRule
    patterns: tuple[re.Pattern[str], ...] = field(default=())


def _pattern(rule: WeightRule, target: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>[^/]+)"

    end = "(?=/|$)" if rule.transform is None else "$"
    return re.compile("(?:^|(?<=/))" + PLACEHOLDER.sub(group, re.escape(target)) + end)


def _declared(modules: Mapping[str, nnx.Module]) -> list[tuple[str, WeightRule]]:
    return [(scope, rule) for scope, node in modules.items() for rule in getattr(node, "weight_map", ())]


def _rules(modules: Mapping[str, nnx.Module], form: str | None) -> list[_Scoped]:
    forms = _forms(modules)
    form = form if form in forms else forms[0]
    return [
        _Scoped(scope, rule, tuple(_pattern(rule, target) for target in rule.targets))
        for scope, rule in _declared(modules)
        if rule.form in (None, form)
    ]


def _forms(modules: Mapping[str, nnx.Module]) -> list[str]:
    named = [rule.form for _, rule in _declared(modules) if rule.form is not None]
    return list(dict.fromkeys(named)) or ["file"]


def stored_variables(module: nnx.Module) -> dict[str, Held]:
    """Return the variables that belong in a file: all but random states, caches and `persistent=False`."""
    return {
        path: variable
        for path, variable in named_variables(module).items()
        if not issubclass(kind_of(variable), VOLATILE) and variable.get_metadata().get("persistent", True)
    }


def build_links(
    module: nnx.Module,
    variables: Mapping[str, Held] | None = None,
    modules: Mapping[str, nnx.Module] | None = None,
    form: str | None = None,
) -> list[Link]:
    """Return the weight map of `module` (concrete or abstract), one `Link` per rule application, in path order.

    Args:
        module: the whole model.
        variables: `stored_variables(module)`, if the caller has it already.
        modules: `named_modules(module)`, if the caller has it already.
        form: of the checkpoint; the one that saving writes if `None` or if the module knows no such form.

    Raises:
        ValueError: two links name the same tensor, or a rule of several targets finds only some of them, and the others
            are not quantized.
    """
    variables = stored_variables(module) if variables is None else variables
    modules = named_modules(module) if modules is None else modules
    shapes = {path: tuple(variable.shape) for path, variable in variables.items()}
    rules = _rules(modules, form)
    plain = _plain_links(shapes, modules, rules)
    links: list[Link] = []
    done: set[str] = set()
    for path in shapes:
        if path not in done:
            links.append(next(_ruled(path, shapes, rules), None) or plain[path])
            done.update(links[-1].targets)
    owners: dict[str, Link] = {}
    for link in links:
        for source in link.sources:
            if source in owners:
                raise ValueError(
                    f"the weight map gives {owners[source].targets} and {link.targets} the same tensor {source!r}; "
                    "declare a weight_map on the module's class that tells them apart"
                )
            owners[source] = link
    return links


def links_by_form(
    module: nnx.Module, variables: Mapping[str, Held], modules: Mapping[str, nnx.Module]
) -> dict[str, list[Link]]:
    """Return the weight map in each form that the module's rules name, the one that saving writes first."""
    return {form: build_links(module, variables, modules, form) for form in _forms(modules)}


def _ruled(path: str, shapes: Mapping[str, Shape], rules: Sequence[_Scoped]) -> Iterator[Link]:
    for scoped in rules:
        rule, prefix = scoped.rule, f"{scoped.scope}/" if scoped.scope else ""
        if rule.transform is None or not path.startswith(prefix):
            continue
        match = next((m for p in scoped.patterns if (m := p.search(path, len(prefix)))), None)
        if match is None:
            continue
        head, groups = path[: match.start()], match.groupdict()
        targets = tuple(head + target.format(**groups) for target in rule.targets)
        absent = [target for target in targets if target not in shapes]
        if absent and all(_has_codes(target, shapes) for target in absent):
            continue  # some parts of a fused tensor are quantized: it is written part by part, in a layout of our own
        if absent:
            raise ValueError(f"the weight rule {rule.source!r} for {path!r} also needs {', '.join(absent)}")
        target_shapes = tuple(shapes[target] for target in targets)
        start = _renamed(head, rules)
        sources = tuple(name for source in rule.sources for name in _expand(start + source, groups, target_shapes[0]))
        yield Link(sources, targets, rule.transform, tuple(rule.transform.source_shapes(target_shapes)), target_shapes)


def _has_codes(target: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a layer holds codes in place of its kernel (`easydel.hub.quantized`)."""
    layer, _, name = target.rpartition("/")
    return name == "kernel" and f"{layer}/codes" in shapes


def _expand(source: str, groups: Mapping[str, str], shape: Shape) -> list[str]:
    free = set(PLACEHOLDER.findall(source)) - set(groups)
    if not free:
        return [source.format(**groups)]
    name = free.pop()
    return [source.format(**groups, **{name: n}) for n in range(shape[0])]


def _renamed(path: str, rules: Sequence[_Scoped]) -> str:
    """Apply the module renames, each once, then turn the path into a dotted name."""
    # Those of inner modules first: their scopes are paths as they are here.
    for scoped in sorted(rules, key=lambda scoped: -len(scoped.scope)):
        start = len(scoped.scope) + 1 if scoped.scope else 0
        if scoped.rule.transform is not None or (scoped.scope and not path.startswith(f"{scoped.scope}/")):
            continue
        if match := scoped.patterns[0].search(path, start):
            new = scoped.rule.sources[0].format(**match.groupdict())
            path = (path[: match.start()] + new + path[match.end() :]).removeprefix("/")
    return path.replace("/", ".")


def _plain_links(shapes: Mapping[str, Shape], modules: Mapping[str, Any], rules: Sequence[_Scoped]) -> dict[str, Link]:
    wishes: dict[str, tuple[str, Permute]] = {}
    for path, shape in shapes.items():
        parent, _, leaf = path.rpartition("/")
        transform = IDENTITY
        if leaf == "kernel" and isinstance(modules.get(parent), nnx.Conv):
            leaf, transform = "weight", Permute((*range(2, len(shape)), 1, 0))
            # source [out, in, *k] -> target [*k, in, out]
        elif leaf == "kernel" and len(shape) == 2:
            leaf, transform = "weight", TRANSPOSE
        wishes[path] = (f"{parent}/{LEAVES.get(leaf, leaf)}" if parent else LEAVES.get(leaf, leaf), transform)
    counts = Counter(name for name, _ in wishes.values())
    links = {}
    for path, (name, transform) in wishes.items():
        if counts[name] > 1:
            name, transform = path, IDENTITY
        source = tuple(transform.source_shapes([shapes[path]]))
        links[path] = Link((_renamed(name, rules),), (path,), transform, source, (shapes[path],))
    return links


def tied_names(module: nnx.Module) -> dict[str, str]:
    """Return checkpoint name → checkpoint name of the tensors that a tied module writes only once."""
    return dict(module.tied_names()) if hasattr(module, "tied_names") else {}


def harmless_patterns(modules: Mapping[str, nnx.Module]) -> list[re.Pattern[str]]:
    """Return the `harmless_extras` of all these modules."""
    found = {p: None for node in modules.values() for p in getattr(type(node), "harmless_extras", ())}
    return [re.compile(pattern) for pattern in found]


__all__ = ["IDENTITY", "TRANSPOSE", "Link", "Permute", "Split", "Stack", "WeightRule", "build_links"]
