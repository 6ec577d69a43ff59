"""Directories that are saved into: whatever fails, a reader sees all of the old files or all of the new."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from easydel.errors import CheckpointError
from easydel.hub.commit import commit, locked, recover_locked, staging, sweep

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def saved_into(directory: Path) -> Iterator[None]:
    """Make a directory for what a block saves, and take it away again if nothing was saved.

    Raises:
        CheckpointError: the directory is a file, or the block failed because it is read-only or the disk full.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give a directory to save into")
    made = make_directory(directory)
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in FULL else f"cannot be saved into: {error}"
        raise CheckpointError(f"{directory}: {what}; nothing was changed. Free some space or save elsewhere") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was saved into it


def check_room(directory: Path, needed: int) -> None:
    """Raise `CheckpointError` if a disk has not so many bytes."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"{directory}: saving needs {needed:,} bytes but the disk has {free:,} free; nothing was changed"
        )


def make_directory(directory: Path) -> list[Path]:
    """Make a directory and return those that were made for it, innermost first."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be made: {error}; save elsewhere") from error
    return made


def recover_all(directory: Path) -> None:
    """Finish or clear away what earlier saves left; the caller holds the directory's lock."""
    recover_locked(directory, discard_conflicts=True)
    sweep(directory)


def replace_files(directory: Path, files: Mapping[str, bytes], stale: Sequence[str] = ()) -> None:
    """Write files into a directory, by the protocol of `commit.py`.

    Args:
        directory: a new or an existing one; its other files stay.
        files: plain name → content, moved into place in this order.
        stale: names of files that the new ones replace; they are removed.

    Raises:
        CheckpointError: the directory is a file, read-only or too full; nothing is changed.
    """
    with saved_into(directory):
        check_room(directory, sum(map(len, files.values())))
        with staging(directory) as stage:
            for name, content in files.items():
                (stage / name).write_bytes(content)
            with locked(directory):
                recover_all(directory)
                commit(directory, stage, list(files), [name for name in stale if (directory / name).exists()], [])
