"""The corpus: sources and docstrings of the running interpreter's standard library."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests, programs that ship along, generated tables, and what describes one machine's build.
EXCLUDED_FOLDERS = {
    "__pycache__", "_bundled", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
EXCLUDED_FILES = {"html/entities.py", "stringprep.py", "this.py", "antigravity.py"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
# Modules whose import does something (opens a window, needs a platform) or that hold private machinery.
SILENT_MODULES = {"antigravity", "this", "idlelib"}
VALIDATION_PERCENT = 4


class Document(NamedTuple):
    """One text of the corpus and the name that decides its side of the split."""

    name: str
    text: str

    @property
    def is_validation(self) -> bool:
        """Whether the hash of the *name* puts the document on the validation side, on every machine alike."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT


def source_documents() -> Iterator[Document]:
    """Yield the library's Python sources, in the order of their relative paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if EXCLUDED_FOLDERS & set(relative.parts) or name in EXCLUDED_FILES or name.startswith(EXCLUDED_PREFIXES):
            continue
        text = path.read_text(encoding="utf-8", errors="strict") if _is_utf8(path) else ""
        if len(text) > 200:
            yield Document(name, text)


def docstring_documents() -> Iterator[Document]:
    """Yield, for each module written in C, a page of signatures and docstrings that looks like a Python source."""
    for name in sorted(sys.stdlib_module_names - SILENT_MODULES):
        if name.startswith("_"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if str(getattr(module, "__file__", "")).endswith(".py"):
            continue
        text = "\n\n".join([f'"""{inspect.getdoc(module) or name}"""', *_stubs(module)])
        if len(text) > 200:
            yield Document(f"{name}.doc", text + "\n")


def documents() -> list[Document]:
    """Return the whole corpus, sources first."""
    return [*source_documents(), *docstring_documents()]


def _stubs(module: object) -> Iterator[str]:
    for name, member in sorted(vars(module).items()):
        doc = inspect.getdoc(member) if callable(member) and not name.startswith("_") else None
        if not doc:
            continue
        header = f"class {name}:" if isinstance(member, type) else f"def {name}{_signature(member)}:"
        body = "\n".join(f"    {line}" if line else "" for line in doc.splitlines())
        yield f'{header}\n    """{body.strip()}"""'


def _signature(function: object) -> str:
    try:
        return str(inspect.signature(function))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # many C functions do not tell theirs
        return "(*args)"


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few sources declare another encoding; they are left out
        return False
    return True
