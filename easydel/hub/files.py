"""Files that appear in a directory all at once or not at all, written by process 0 for all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from easydel.checkpoints.room import NO_ROOM
from easydel.distributed import by_first
from easydel.errors import CheckpointError
from easydel.hub.commit import commit, locked, recover_locked, staging, sweep


@contextlib.contextmanager
def staged(directory: Path, needed: int) -> Iterator[Path]:
    """Give a stage in a directory that is made if there is none; process 0 holds it for all.

    Args:
        directory: to save into.
        needed: bytes that will be written.

    Raises:
        CheckpointError: it is a file, read-only or too full; nothing is changed.
    """
    with contextlib.ExitStack() as held:

        def begin() -> str:
            if directory.exists() and not directory.is_dir():
                raise CheckpointError(f"{directory}: is a file; give a directory to save into")
            held.callback(_remove_empty, make_directory(directory))
            with explained(directory):
                with locked(directory):
                    recover_all(directory)
                free = shutil.disk_usage(directory).free
                if needed > free:
                    raise CheckpointError(
                        f"{directory}: saving needs {needed:,} bytes but the disk has {free:,} free; nothing was "
                        "changed"
                    )
                return held.enter_context(staging(directory)).name

        yield directory / by_first(begin)


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn what the system says of a directory that cannot be saved into into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in NO_ROOM else f"cannot be saved into: {error}"
        raise CheckpointError(f"{directory}: {what}; nothing was changed. Free some space or save elsewhere") from error


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing was saved into it


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
