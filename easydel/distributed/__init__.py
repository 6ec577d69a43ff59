"""Several processes as one run: how they find one another, what one does for all, and what each holds of an array."""

from easydel.distributed.gather import is_apart, whole
from easydel.distributed.once import broadcast, by_first, from_all, speaks, together, warn
from easydel.distributed.start import initialize, is_first

__all__ = [
    "broadcast",
    "by_first",
    "from_all",
    "initialize",
    "is_apart",
    "is_first",
    "speaks",
    "together",
    "warn",
    "whole",
]
