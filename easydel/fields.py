"""From a mapping, such as a file holds, to the fields of a dataclass: names and types checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from easydel.paths import nearest


class _Misfit(Exception):
    """A value of another type."""


def read_fields(
    cls: type, values: Mapping[str, Any], where: str = "", names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check a mapping against a dataclass, and return the arguments for it.

    Text that spells a number is one where only a number is expected, a list becomes a tuple, and a mapping what its
    field's class makes of it.

    Args:
        cls: the dataclass.
        values: name → value.
        where: what the mapping is called in messages; the class's name if empty.
        names: what fields are called in the mapping → their names in the class, if those differ; no others are known.

    Raises:
        ValueError: names that are no fields (the nearest is named) and values of another type, all together.
    """
    where = where or cls.__name__
    known = {field.name: field.name for field in dataclasses.fields(cls)} if names is None else names
    hints = typing.get_type_hints(cls)
    problems, read = [], {}
    for name, value in values.items():
        if name not in known:
            problems.append(unknown_field(where, name, known))
            continue
        hint = hints[known[name]]
        try:
            read[known[name]] = _read(value, hint)
        except _Misfit:
            problems.append(f"{where}.{name}: expected {_described(hint)}, got {value!r}")
        except ValueError as error:  # of the class that takes the mapping
            problems.append(f"{where}.{name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return read


def unknown_field(where: str, name: object, known: Iterable[str]) -> str:
    """Say that there is no such field, and which is nearest."""
    near = nearest(str(name), known)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where} has no field {name!r}; {hint}"


def _read(value: Any, hint: Any) -> Any:
    """Return a value as one of the kinds that a type hint allows."""
    kinds = _kinds(hint)
    for kind in kinds:
        try:
            return _fit(value, kind)
        except _Misfit:
            continue
    for kind in (int, float):
        if isinstance(value, str) and kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    raise _Misfit


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fit(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return value
    if origin in (list, tuple, Sequence):
        if isinstance(value, list | tuple):
            return tuple(_read(item, typing.get_args(kind)[0]) for item in value)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif kind in (int, float):
        if isinstance(value, int | kind) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    elif isinstance(value, Mapping) and dataclasses.is_dataclass(kind) and hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    raise _Misfit


def _described(hint: Any) -> str:
    """Return what a type hint allows, in the words of a file's reader."""
    said = []
    for kind in _kinds(hint):
        origin = typing.get_origin(kind) or kind
        if origin in (list, tuple, Sequence):
            said.append("a list")
        elif origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
            said.append("a mapping")
        else:
            said.append({types.NoneType: "null", str: "text"}.get(kind, kind.__name__))
    return " or ".join(dict.fromkeys(said))
