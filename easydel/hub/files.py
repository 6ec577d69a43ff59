"""Small sets of files that belong together, written so that a reader sees all of the old ones or all of the new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from easydel.distributed import by_first
from easydel.hub.commit import commit, locked
from easydel.hub.save import explained, recover_all, staged


def replace_files(directory: Path, files: Mapping[str, bytes], stale: Sequence[str] = ()) -> None:
    """Write files into a directory, by the protocol of `commit.py`; process 0 does, and all wait for it.

    Args:
        directory: a new or an existing one; its other files stay.
        files: plain name → content, moved into place in this order.
        stale: names of files that the new ones replace; they are removed.

    Raises:
        CheckpointError: the directory is a file, read-only or too full; nothing is changed.
    """
    with staged(directory, sum(map(len, files.values()))) as stage:

        def write() -> None:
            with explained(directory):
                for name, content in files.items():
                    (stage / name).write_bytes(content)
                with locked(directory):
                    recover_all(directory)
                    commit(directory, stage, list(files), [name for name in stale if (directory / name).exists()], [])

        by_first(write)
