"""Build the optional C++ kernels (easydel/native/build.py) while the package is built or installed."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Puts the kernels beside their source, where an editable install finds them, too; the wheel is this platform's.

    Where they cannot be built, the package is complete without them, and the build says so.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files are collected."""
        build = runpy.run_path(str(Path(self.root) / "easydel" / "native" / "build.py"))
        problem = build["compile_kernels"]()
        if problem is not None:
            self.app.display_warning(f"easydel goes without its C++ kernels for CPUs: {problem}")
            return
        build_data["artifacts"].append(build["LIBRARY"].relative_to(self.root).as_posix())
        if version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
