"""Build the optional C++ kernels while the package is built or installed.

They are compiled with the system's C++ compiler (`CXX`, else `c++`) against the headers that jaxlib carries. Where that
does not work, the package is complete without them, and the build says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("easydel") / "native"
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w")


class NativeKernels(BuildHookInterface):
    """Compiles `easydel/native/kernels.cc` into a shared library beside it, and makes the wheel one of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files are collected; an editable install then has the library in the source tree."""
        library = FOLDER / f"libkernels.{'dylib' if sys.platform == 'darwin' else 'so'}"
        problem = compile_kernels(Path(self.root) / FOLDER / "kernels.cc", Path(self.root) / library)
        if problem is not None:
            self.app.display_warning(f"easydel goes without its C++ kernels for CPUs: {problem}")
            return
        build_data["artifacts"].append(str(library))
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_kernels(source: Path, library: Path) -> str | None:
    """Compile; return why it did not work, or `None`. A library of earlier is removed first, lest it outlive its source."""
    library.unlink(missing_ok=True)
    if os.environ.get("EASYDEL_NATIVE") == "0":
        return "EASYDEL_NATIVE=0"
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        return "no C++ compiler was found (set CXX)"
    try:
        import jaxlib
    except ImportError:
        return "jaxlib, whose headers they need, is not there"
    headers = Path(jaxlib.__file__).parent / "include"
    made = library.with_suffix(".part")
    done = subprocess.run(
        [compiler, *FLAGS, f"-I{headers}", str(source), "-o", str(made)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        made.unlink(missing_ok=True)
        return f"{compiler} failed:\n{done.stderr[-2000:]}"
    made.replace(library)
    return None
