"""Several processes as one run: how they find one another, who speaks for all, and what happens when one is lost."""

from easydel.distributed.start import initialize, is_first, note, telling_the_others
from easydel.distributed.watch import EXIT_CODE
from easydel.errors import DistributedError

__all__ = ["EXIT_CODE", "DistributedError", "initialize", "is_first", "note", "telling_the_others"]
