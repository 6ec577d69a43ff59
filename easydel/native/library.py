"""The shared library of the kernels: found, loaded and made known to XLA on first use."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

import jax

from easydel.native.build import LIBRARY

TARGETS = ("easydel_few_rows", "easydel_grouped", "easydel_grouped_outer")


@functools.cache
def is_available() -> bool:
    """Whether the kernels were built, fit the installed jaxlib and are not switched off by `EASYDEL_NATIVE=0`."""
    if os.environ.get("EASYDEL_NATIVE") == "0" or not LIBRARY.exists():
        return False
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # of several kinds, as the loader or jaxlib says no
        warnings.warn(
            f"{LIBRARY.name} does not fit this machine or jaxlib ({error}): products on CPUs go without it; "
            "install easydel again, or run python -m easydel.native",
            stacklevel=2,
        )
        return False
    return True
