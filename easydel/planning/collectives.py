"""What a compiled program sends between devices, read from XLA's text of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_KIND = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\w+)?)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?")

Moved = Counter[tuple[str, str]]
"""(kind, axes) → bytes."""


def collective_bytes(text: str, mesh: Any) -> Moved:
    """Sum the bytes of each collective's result on one device, those in a loop as often as it is run.

    Args:
        text: of a compiled program (`compiled.as_text()`).
        mesh: whose axes the groups of devices are told by: `"fsdp"`, `"dp+fsdp"`.

    Returns:
        (kind, axes) → bytes. The kinds are XLA's, such as `all_gather`.
    """
    bodies, entry = _computations(text)
    known: dict[str, Moved] = {}

    def of(name: str) -> Moved:
        if name not in known:
            known[name] = Counter()  # a computation does not call itself
            for line in bodies.get(name, ()):
                if found := _KIND.search(line):
                    size = _result_bytes(line[: found.start()], started="-start(" in found[0])
                    known[name][found[1].replace("-", "_"), _axes(line, found[1], mesh)] += size
                for called, times in _calls(line):
                    for key, size in of(called).items():
                        known[name][key] += times * size
        return known[name]

    return of(entry)


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            bodies[current], entry = [], current if head[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _calls(line: str) -> list[tuple[str, int]]:
    """Return the computations that a line runs, and how often; of a loop of unknown length, once."""
    if _KIND.search(line) or not ("=%" in line or "={%" in line):
        return []
    trips = int(found[1]) if " while(" in line and (found := _TRIPS.search(line)) else 1
    names = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        names += [name.strip().removeprefix("%") for name in group.split(",")][:1]
    return [(name, trips) for name in names]


def _result_bytes(declared: str, *, started: bool) -> int:
    arrays = _ARRAY.findall(declared.partition(" = ")[2])
    if started:  # the operands stand before the results
        arrays = arrays[len(arrays) // 2 :]
    return sum(_width(dtype) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _axes(line: str, kind: str, mesh: Any) -> str:
    """Return the names of the axes along which a collective's first group of devices differs."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
        group = np.array([int(pairs[1]), int(pairs[2])]) if pairs else np.arange(1)
    else:
        group = _first_group(line.partition("replica_groups=")[2], mesh.size)
    places = np.stack(np.unravel_index(group, tuple(mesh.shape.values())))
    return "+".join(name for name, place in zip(mesh.shape, places, strict=True) if len(set(place.tolist())) > 1)


def _first_group(text: str, size: int) -> np.ndarray:
    """Read the first group of devices: listed, as a slice of a transposed range, or along axes of a mesh of XLA's."""
    if text.startswith("mesh["):
        return _along_axes(text)
    if text.startswith("{}"):
        return np.arange(size)
    if text.startswith("{"):
        return np.array([int(n) for n in text[2 : text.index("}")].split(",")])
    groups, members = _numbers(_IOTA.match(text)[1])  # type: ignore[index]
    return _range(text).reshape(groups, members)[0]


def _range(text: str) -> np.ndarray:
    shape, dims, order = _IOTA.match(text).groups()  # type: ignore[union-attr]
    dims = _numbers(dims or shape)
    devices = np.arange(math.prod(dims)).reshape(dims)
    return (devices.transpose(_numbers(order)) if order else devices).reshape(-1)


def _along_axes(text: str) -> np.ndarray:
    """Read `mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a', 'b':(1)2}`; the last is a part of an axis."""
    head, _, rest = text.partition("]")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head)}
    devices = np.arange(math.prod(sizes.values()))
    if found := re.match(r", device_ids=\((\[[^)]*?\](?:T\([\d,]+\))?)\)", rest):
        dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", found[1]).groups()  # type: ignore[union-attr]
        grid = np.arange(len(devices)).reshape(_numbers(dims))
        devices = (grid.transpose(_numbers(order)) if order else grid).reshape(-1)
    devices = devices.reshape(tuple(sizes.values()))
    chosen = {}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", rest[rest.index("{") : rest.index("}")]):
        inner = sizes[name] // (int(before) * int(part)) if part else 1
        chosen[name] = np.arange(int(part) if part else sizes[name]) * inner
    return devices[np.ix_(*(chosen.get(name, np.arange(1)) for name in sizes))].reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
