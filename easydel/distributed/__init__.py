"""Several processes as one run.

How they find one another, what one does for all, what each holds of an array, and what happens when one is lost.
"""

from easydel.distributed.gather import is_apart, whole
from easydel.distributed.once import broadcast, by_first, from_all, is_first, together, warn
from easydel.distributed.start import initialize, note, telling_the_others
from easydel.distributed.watch import EXIT_CODE
from easydel.errors import DistributedError

__all__ = [
    "EXIT_CODE",
    "DistributedError",
    "broadcast",
    "by_first",
    "from_all",
    "initialize",
    "is_apart",
    "is_first",
    "note",
    "telling_the_others",
    "together",
    "warn",
    "whole",
]
