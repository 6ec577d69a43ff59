"""Fit a checkpoint's table of tensors to a module's weight map, before a byte of any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.distributed import warn
from easydel.errors import CheckpointError
from easydel.hub.forms import choose_links
from easydel.hub.inner import inner_table
from easydel.hub.report import Problem, describe, raise_problems
from easydel.hub.safetensors import TensorEntry
from easydel.hub.weight_map import Link, harmless_patterns, links_by_form, stored_variables, tied_names
from easydel.paths import named_modules, named_variables, nearest
from easydel.stacked import Held, kind_of

OTHER_HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "cls.")
CHUNK = 2**22


@dataclass(frozen=True)
class Match:
    """What to do: read `links` (their sources are keys of `table`), initialise `new` (paths)."""

    links: tuple[Link, ...]
    new: tuple[str, ...]
    table: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Aligned:
    """A checkpoint's `table` under a module's names; beside it `heads` that no backbone has, and other models' `parts`.

    `heads` are names of tensors; `parts` says how many tensors each part of a larger model has that were left out.
    """

    table: Mapping[str, TensorEntry]
    heads: list[str]
    parts: Mapping[str, int]


def match_checkpoint(
    module: nnx.Module, table: Mapping[str, TensorEntry], where: Path, allow_new: Sequence[str] = ()
) -> Match:
    """Pair every variable of the (abstract) `module` with its tensors.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or another kind of number; all are listed.
    """
    variables, modules = stored_variables(module), named_modules(module)  # walking a deep module is slow: once
    forms = links_by_form(module, variables, modules)
    wanted = {source for links in forms.values() for link in links for source in link.sources}
    aligned = aligned_table(module, table, wanted, modules)
    table = aligned.table
    ties = tied_names(module)
    for alias, name in ties.items():  # a file may hold a tied tensor under its other name only
        if name in wanted and name not in table and alias in table:
            table = {**table, name: replace(table[alias], name=name)}
    links = choose_links(forms, table.keys())
    wanted = {source for link in links for source in link.sources}
    problems: list[Problem] = []
    chosen: list[Link] = []
    new = [path for path in named_variables(module) if path not in variables]
    for link in links:
        absent = [source for source in link.sources if source not in table]
        if not absent:
            faults = _faults(link, table, variables)
            # A head of another size under `allow_new` (a new number of labels) starts afresh, as asked.
            if faults and _allowed(link, allow_new):
                new += link.targets
            else:
                problems += faults
                chosen.append(link)
        elif _allowed(link, allow_new) or not any(_required(variables[path]) for path in link.targets):
            new += link.targets
        else:
            problems += [_missing(name, link, variables, table) for name in absent]
    harmless = harmless_patterns(modules)
    unexpected, unused = _extras(harmless, table, wanted, ties, where)
    problems += unexpected
    cure = "Check that this checkpoint belongs to this model class and config."
    if any(problem.kind == "missing" for problem in problems):
        cure += " Tensors that are meant to be new can be initialised: allow_new=[<patterns of their names>]."
    if aligned.parts:
        cure += " The files hold it inside a larger model; the names above are those that it has alone."
    raise_problems(problems, where, cure)
    if unused := [name for name in (*aligned.heads, *unused) if not any(pattern.search(name) for pattern in harmless)]:
        warn(
            f"{where}: {type(module).__name__} does not use these tensors of other task heads: {', '.join(unused)}",
            stacklevel=4,
        )
    if aligned.parts:
        counts = aligned.parts.items()
        beside = ", ".join(f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in counts)
        warn(f"{where}: {type(module).__name__} is one part of this model; left out are {beside}", stacklevel=4)
    return Match(tuple(chosen), tuple(new), table)


def aligned_table(
    module: nnx.Module,
    table: Mapping[str, TensorEntry],
    wanted: set[str],
    modules: Mapping[str, nnx.Module],
) -> Aligned:
    """Return a checkpoint's table under the names that a module wants."""
    prefix = getattr(module, "base_model_prefix", "") or ""
    inner, parts = inner_table(table, wanted, prefix, OTHER_HEADS)
    return Aligned(*_align_prefix(_renamed(inner, modules), wanted, prefix), parts)


def _renamed(table: Mapping[str, TensorEntry], modules: Mapping[str, nnx.Module]) -> Mapping[str, TensorEntry]:
    """Give tensors under names of older versions (`legacy_names` of the modules) today's names."""
    rules = dict.fromkeys(rule for node in modules.values() for rule in getattr(type(node), "legacy_names", ()))
    renamed: dict[str, TensorEntry] = {}
    for name, entry in table.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        # Beside a tensor of today's name the old one stays, and is reported.
        free = new not in table and new not in renamed
        renamed[new if free else name] = entry
    return renamed


def _required(variable: Held) -> bool:
    return issubclass(kind_of(variable), nnx.Param) or getattr(kind_of(variable), "must_load", False)


def _allowed(link: Link, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in (*link.targets, *link.sources))


def _align_prefix(
    table: Mapping[str, TensorEntry], wanted: set[str], prefix: str
) -> tuple[Mapping[str, TensorEntry], list[str]]:
    """Give the file's names the module's prefix, or take it away; return the renamed table and what no backbone has."""
    dot = f"{prefix}."
    if not prefix or not table:
        return table, []
    ours, theirs = (any(name.startswith(dot) for name in names) for names in (wanted, table))
    if ours and not theirs:
        free = (*OTHER_HEADS,)
        names = {name: name if name in wanted or name.startswith(free) else dot + name for name in table}
        return {new: table[name] for name, new in names.items()}, []
    if theirs and not ours:
        # Who loads a backbone wants it without the usual heads; whatever else is left out is worth a word.
        known = (dot, *OTHER_HEADS)
        heads = [name for name in table if not name.startswith(known) and name not in wanted]
        inner = {name.removeprefix(dot): entry for name, entry in table.items() if name.startswith(dot)}
        if twice := sorted(inner.keys() & table.keys()):
            entry = table[twice[0]]
            raise CheckpointError(
                f"{entry.file}: holds {twice[0]!r} both with and without the prefix {dot!r} ({len(twice)} such names); "
                "which one is meant cannot be told. Remove one of each pair"
            )
        return {name: table[name] for name in table if name in wanted} | inner, heads
    return table, []


def _kind(dtype: np.dtype) -> str:
    for kind in (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return str(dtype)


def _faults(link: Link, table: Mapping[str, TensorEntry], variables: Mapping[str, Held]) -> list[Problem]:
    dtype = np.dtype(variables[link.targets[0]].dtype)
    floats = jnp.issubdtype(dtype, jnp.floating)
    found = []
    for name, shape in zip(link.sources, link.source_shapes, strict=True):
        entry = table[name]
        # Integer codes must come back exactly; floats may be stored in any float type.
        fits = _kind(entry.dtype) == _kind(dtype) if floats else entry.dtype == dtype
        if not fits:
            wish = "a float type" if floats else dtype
            found.append(Problem("dtype", name, describe(wish, shape), describe(entry.dtype, entry.shape)))
        elif entry.shape != shape:
            found.append(Problem("shape", name, describe(dtype, shape), describe(entry.dtype, entry.shape)))
    return found


def _missing(name: str, link: Link, variables: Mapping[str, Held], table: Mapping[str, TensorEntry]) -> Problem:
    shape = link.source_shapes[link.sources.index(name)]
    near = nearest(name, [other for other in table if other.rpartition(".")[2] == name.rpartition(".")[2]], 1)
    hint = f"nothing (nearest: {near[0]})" if near else "nothing"
    return Problem("missing", name, describe(variables[link.targets[0]].dtype, shape), hint)


def _extras(
    harmless: Sequence[re.Pattern[str]],
    table: Mapping[str, TensorEntry],
    wanted: set[str],
    ties: Mapping[str, str],
    where: Path,
) -> tuple[list[Problem], list[str]]:
    """Return (tensors nothing explains, tensors of other task heads); check the file's copies of tied ones."""
    unused: list[str] = []
    problems: list[Problem] = []
    for name, entry in table.items():
        if name in wanted or any(pattern.search(name) for pattern in harmless):
            continue
        if name in ties and ties[name] in table:
            _check_tied(name, entry, table[ties[name]], where)
        elif name.startswith(OTHER_HEADS):
            unused.append(name)
        else:
            problems.append(Problem("unexpected", name, "nothing", describe(entry.dtype, entry.shape)))
    return problems, unused


def _check_tied(name: str, entry: TensorEntry, twin: TensorEntry, where: Path) -> None:
    """Raise unless the file's copy of a tied tensor equals the one it is tied to."""
    equal = entry.shape == twin.shape
    rows = max(1, CHUNK // max(1, entry.nbytes // max(1, entry.shape[0]))) if entry.shape else 1
    if equal and entry.shape and (entry.file, entry.start) != (twin.file, twin.start):
        for start in range(0, entry.shape[0], rows):
            block = (slice(start, start + rows), *(slice(None) for _ in entry.shape[1:]))
            one, two = entry.read(block), twin.read(block)
            if not np.array_equal(one.astype(np.float32), two.astype(np.float32), equal_nan=True):
                equal = False
                break
    if not equal:
        raise CheckpointError(
            f"{where}: the config says tie_word_embeddings=True, but the file's {name!r} differs from the tensor it "
            f"would be tied to ({twin.name!r}); load with tie_word_embeddings=False to use both"
        )
