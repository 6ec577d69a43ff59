"""Kernels in C++ for CPUs: an optional part of the package, built when it is installed.

Without them (no compiler, another platform, `EASYDEL_NATIVE=0`) everything works the same by XLA alone, only slower.
Each kernel has an XLA form of the same result; `jax.lax.platform_dependent` takes the kernel where a program is
compiled for a CPU.
"""

from easydel.native.few_dots import few_dots, serves_few_dots
from easydel.native.few_rows import few_rows, serves_few_rows
from easydel.native.grouped import grouped, serves_grouped
from easydel.native.library import is_available
from easydel.native.many_rows import many_rows, serves_many_rows
from easydel.native.one_query import one_query, serves_one_query
from easydel.native.quantized import MOST_ROWS, dequantized, integer_rows, quantized_rows, serves_quantized_rows
from easydel.native.quantized_groups import integer_groups, quantized_groups, serves_quantized_groups
from easydel.native.slices import Slice, kernels_are_sliced, slice_of

__all__ = [
    "MOST_ROWS",
    "Slice",
    "dequantized",
    "few_dots",
    "few_rows",
    "grouped",
    "integer_groups",
    "integer_rows",
    "is_available",
    "kernels_are_sliced",
    "many_rows",
    "one_query",
    "quantized_groups",
    "quantized_rows",
    "serves_few_dots",
    "serves_few_rows",
    "serves_grouped",
    "serves_many_rows",
    "serves_one_query",
    "serves_quantized_groups",
    "serves_quantized_rows",
    "slice_of",
]
