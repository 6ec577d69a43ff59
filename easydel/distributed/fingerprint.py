"""What has to be the same in all processes of a run: versions, code, and what the run is told to do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import easydel

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def fingerprint(agreed: Mapping[str, Any]) -> dict[str, str]:
    """Return name → value of all that processes must have in common.

    Args:
        agreed: what else must be the same, such as the content of a configuration file; mappings may be nested.
    """
    values = {"python": platform.python_version(), "easydel": easydel.__version__}
    for package in PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = "not installed"
    values["code of easydel"] = _hash(sorted(Path(__file__).parents[1].rglob("*.py")))
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    if program and program.endswith(".py"):
        values[f"code of {Path(program).name}"] = _hash([Path(program)])
    return values | dict(_flat(agreed))


def differences(mine: Mapping[str, str], theirs: Mapping[str, str], here: str, there: str) -> list[str]:
    """Say in which values two fingerprints differ; a line for each."""
    return [
        f"{name}: {mine.get(name, 'not set')} in {here}, {theirs.get(name, 'not set')} in {there}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def _hash(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:12]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", repr(value))]
    return flat
