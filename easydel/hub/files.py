"""Small sets of files that belong together, written so that a reader sees all of the old ones or all of the new."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from easydel.errors import CheckpointError
from easydel.hub.commit import commit, locked, staging
from easydel.hub.save import FULL, make_directory, recover_all


def replace_files(directory: Path, files: Mapping[str, bytes], stale: Sequence[str] = ()) -> None:
    """Write files into a directory, by the protocol of `commit.py`.

    Args:
        directory: a new or an existing one; its other files stay.
        files: plain name → content, moved into place in this order.
        stale: names of files that the new ones replace; they are removed.

    Raises:
        CheckpointError: the directory is a file, read-only or too full; nothing is changed.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give a directory to save into")
    made = make_directory(directory)
    try:
        needed, free = sum(map(len, files.values())), shutil.disk_usage(directory).free
        if needed > free:
            raise CheckpointError(
                f"{directory}: saving needs {needed:,} bytes but the disk has {free:,} free; nothing was changed"
            )
        with staging(directory) as stage:
            for name, content in files.items():
                (stage / name).write_bytes(content)
            with locked(directory):
                recover_all(directory)
                commit(directory, stage, list(files), [name for name in stale if (directory / name).exists()], [])
    except OSError as error:
        what = "the disk is full" if error.errno in FULL else f"cannot be saved into: {error}"
        raise CheckpointError(f"{directory}: {what}; nothing was changed. Free some space or save elsewhere") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was saved into it
