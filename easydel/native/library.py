"""The shared library of the kernels: found, loaded and made known to XLA on first use."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

import jax

from easydel.native.build import LIBRARY

TARGETS = (
    "easydel_few_dots",
    "easydel_few_rows",
    "easydel_one_query",
    "easydel_grouped",
    "easydel_grouped_outer",
    "easydel_quantized_rows",
    "easydel_integer_rows",
    "easydel_dequantize",
)


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


def serves_quantized() -> bool:
    """Whether there are kernels for quantized weights: they are made of AVX2, which not all processors have."""
    return is_available() and _says("easydel_serves_quantized")


def has_matrix_unit() -> bool:
    """Whether there are kernels for float32 products on the processor's matrix unit."""
    return is_available() and _says("easydel_has_matrix_unit")


@functools.cache
def _says(question: str) -> bool:
    return bool(getattr(ctypes.CDLL(str(LIBRARY)), question)())
