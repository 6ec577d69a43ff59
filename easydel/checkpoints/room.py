"""Whether there was room for a checkpoint, and how much it takes."""

from __future__ import annotations

import errno
import os
import re

from easydel.checkpoints.arrays import Arrays

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a used-up quota, a file beyond the limit of the process."""


def written_here(arrays: Arrays) -> int:
    """Count the bytes that this process writes: of each part of an array that lies on several devices, one copy."""
    return sum(
        shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards if not shard.replica_id
    )


def no_room(error: BaseException | None) -> str | None:
    """Return the system's words if an error, or one behind it, says that there is no room; else `None`.

    tensorstore puts the system's number into the text of a `ValueError`.
    """
    while error is not None:
        told = re.search(r"os_error_code='(\d+)'", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in NO_ROOM:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
