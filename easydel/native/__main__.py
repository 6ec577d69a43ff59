"""`python -m easydel.native`: build the kernels anew."""

from __future__ import annotations

import sys

from easydel.native.build import LIBRARY, compile_kernels

if problem := compile_kernels():
    sys.exit(f"the kernels were not built: {problem}")
print(f"built {LIBRARY}")
