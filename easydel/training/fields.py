"""From a mapping, such as a YAML file holds, to the fields of a dataclass: names and types checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from easydel.paths import nearest

_SCALARS = (bool, int, float, str)


def read_fields(cls: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Check a mapping against a dataclass, and return the arguments for it.

    Text that spells a number is one where a number is expected: YAML reads `1e-4` as text.

    Args:
        cls: the dataclass.
        values: name → value.
        where: what the mapping is called in messages; the class's name if empty.

    Raises:
        ValueError: names that are no fields (the nearest is named) and values of another type, all together.
    """
    where = where or cls.__name__
    known = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    problems, read = [], {}
    for name, value in values.items():
        if name not in known:
            problems.append(unknown_field(where, name, known))
            continue
        allowed = [kind for kind in _alternatives(hints[name]) if kind in (*_SCALARS, type(None))]
        open_ended = len(allowed) < len(_alternatives(hints[name]))
        try:
            read[name] = value if isinstance(value, list | tuple | Mapping) and open_ended else _as(value, allowed)
        except ValueError:
            if open_ended:
                read[name] = value
                continue
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            problems.append(f"{where}.{name}: expected {kinds}, got {value!r}")
    if problems:
        raise ValueError("\n".join(problems))
    return read


def unknown_field(where: str, name: str, known: typing.Iterable[str]) -> str:
    """Say that there is no such field, and which is nearest."""
    near = nearest(str(name), known)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where} has no field {name!r}; {hint}"


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _as(value: Any, allowed: list[Any]) -> Any:
    if value is None and type(None) in allowed:
        return None
    if isinstance(value, bool):
        if bool in allowed:
            return value
        raise ValueError
    for kind in (int, float):
        if kind in allowed and isinstance(value, kind | int):
            return kind(value)
    if isinstance(value, str):
        if str in allowed:
            return value
        if float in allowed:
            return float(value)
        if int in allowed:
            return int(value)
    raise ValueError
