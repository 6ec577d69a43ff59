"""Compile the C++ kernels: done when the package is installed, and by `python -m easydel.native`.

Needs the system's C++ compiler (`CXX`, else `c++`) and the headers that jaxlib carries. The installation runs this file
by its path, without the package around it: it imports nothing of ours.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.cc")))
LIBRARY = FOLDER / f"libkernels.{'dylib' if sys.platform == 'darwin' else 'so'}"
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w")


def compile_kernels(sources: tuple[Path, ...] = SOURCES, library: Path = LIBRARY) -> str | None:
    """Compile `sources`; return why it did not work, or `None` if it did.

    A library of earlier is removed first, lest it outlive its sources.
    """
    library.unlink(missing_ok=True)
    if os.environ.get("EASYDEL_NATIVE") == "0":
        return "EASYDEL_NATIVE=0 is set"
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]!r}: install one, or set CXX"
    try:
        import jaxlib
    except ImportError:
        return "jaxlib, whose headers they need, is not installed"
    made = library.with_name(f"{library.name}.part")
    headers = Path(jaxlib.__file__).parent / "include"
    command = [*compiler, *FLAGS, f"-I{headers}", *map(str, sources), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        made.unlink(missing_ok=True)
        return f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}"
    made.replace(library)
    return None
