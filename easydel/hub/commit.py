"""Replacing a model's files so that a crash at any moment leaves the old or the new one, whole.

The protocol, for a target directory D:

1. *Stage.* Everything new is written into `D/.easydel-save-<id>/` and flushed to disk. D's own files are untouched; a
   crash here leaves the old model, and the next save removes the stage of a dead process (its lock is free).
2. *Commit.* `plan.json`, an ordered list of moves and removals, is added, and the stage is renamed to
   `D/.easydel-commit-<id>/`. That one rename is the commit point.
3. *Apply.* The plan is carried out: new shards move in under names that nothing uses yet, then the config and the
   tokenizer, then the weights switch by a single rename or removal (`model.safetensors` or the index), and last the old
   shards go. Every step can be repeated.
4. A crash after 2 is completed by `recover`, which `resolve_checkpoint` and the next save call first.

To a reader that knows nothing of this, such as transformers, the weights switch in one atomic step at every moment;
only if `config.json` changes too is there an instant, between two renames, in which it sees the new config
beside the old weights. A plan remembers what it replaces (size and time of modification): if somebody else
changed those files after the crash, `recover` refuses instead of mixing two models.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easydel.errors import CheckpointError
from easydel.hub.report import short
from easydel.hub.safetensors import unique_json

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no flock: one writer at a time is then the caller's business
    fcntl = None  # type: ignore[assignment]

STAGE, COMMIT, PLAN = ".easydel-save-", ".easydel-commit-", "plan.json"


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock on a directory (released by the system if the process dies); yield whether it was got."""
    if fcntl is None:
        yield True
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except BlockingIOError:
            got = False
        except OSError:  # a file system without locks
            got = True
        yield got
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Give a fresh, locked stage inside `directory`; whatever is left of it at the end is removed."""
    stage = directory / f"{STAGE}{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, stage, ignore_errors=True)
        with locked(directory):  # or another writer would sweep the stage before its lock is taken
            stage.mkdir()
            held.enter_context(locked(stage))
        yield stage


def identity(path: Path) -> list[int] | None:
    """Return [size, modification time] of a file, `None` if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]


def commit(directory: Path, stage: Path, moves: list[str], removals: list[str], switch: list[str]) -> None:
    """Make the staged files `moves` and then the removals `switch`, `removals` take effect, all or nothing.

    The caller holds the lock on `directory`. Order: moves as given, `switch`, `removals`.
    """
    steps: list[dict[str, Any]] = [{"do": "move", "name": n, "was": identity(directory / n)} for n in moves]
    steps += [{"do": "remove", "name": n, "was": identity(directory / n)} for n in (*switch, *removals)]
    (stage / PLAN).write_text(json.dumps(steps))
    for folder, _, files in os.walk(stage):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    final = directory / stage.name.replace(STAGE, COMMIT)
    stage.rename(final)
    try:
        sync(directory)
        _apply(directory, final)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: the new model is written and committed, but could not be moved into place: {error}. "
            "Loading from or saving into this directory tries again"
        ) from error


def recover(directory: Path) -> None:
    """Complete a save that a crash interrupted after its commit point; otherwise do nothing.

    Raises:
        CheckpointError: files it would replace were changed by somebody else in the meantime.
    """
    if not any(directory.glob(f"{COMMIT}*")):
        return
    try:
        with locked(directory):
            recover_locked(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: a save was interrupted and cannot be completed: {error}") from error


def recover_locked(directory: Path, *, discard_conflicts: bool = False) -> None:
    """`recover` for a caller that holds the lock; `discard_conflicts` drops plans that somebody else overtook."""
    for pending in sorted(directory.glob(f"{COMMIT}*")):
        _apply(directory, pending, discard_conflicts)


def sweep(directory: Path) -> None:
    """Remove stages whose writers died."""
    for stage in directory.glob(f"{STAGE}*"):
        if stage.is_symlink() or not stage.is_dir():
            continue  # none of ours
        with contextlib.suppress(FileNotFoundError), locked(stage, wait=False) as free:
            if free:
                shutil.rmtree(stage, ignore_errors=True)


def read_plan(directory: Path, pending: Path) -> list[dict[str, Any]]:
    """Return the steps of an interrupted save; none if it had finished.

    The directory may have been written by a stranger, so a plan may only touch plain names inside it.

    Raises:
        CheckpointError: what is there was not written by a save of ours.
    """
    plan = pending / PLAN
    if not plan.is_file():
        return []  # the plan is the last to go, so without it all is done
    steps = unique_json(plan.read_bytes(), str(plan))
    home = directory.resolve()
    for step in steps if isinstance(steps, list) else [None]:
        fields = step if isinstance(step, dict) and set(step) == {"do", "name", "was"} else {}
        name = fields["name"] if fields.get("do") in ("move", "remove") and isinstance(fields["name"], str) else ""
        plain = not {"..", ".", ""} & {*name.split("/")} and not {":", "\\"} & {*name}
        if not plain or not (directory / name).parent.resolve().is_relative_to(home):
            raise CheckpointError(
                f"{plan}: is not the plan of a save ({short(step)}); nothing was moved. Delete {pending} to load what "
                "is there"
            )
    return steps


def _apply(directory: Path, pending: Path, discard_conflicts: bool = False) -> None:
    if pending.is_symlink() or not pending.is_dir():
        raise CheckpointError(f"{pending}: is not the folder of an interrupted save; delete it")
    steps = read_plan(directory, pending)
    moves = [step for step in steps if step["do"] == "move" and (pending / step["name"]).is_file()]
    foreign = [step["name"] for step in moves if identity(directory / step["name"]) != step["was"]]
    if foreign and not discard_conflicts:
        raise CheckpointError(
            f"{directory}: a save was interrupted and waits in {pending.name}, but {', '.join(foreign)} changed since. "
            f"To keep what is there now, delete {pending.name}; to finish the save, move its files over"
        )
    if not foreign:
        for step in moves:
            target = directory / step["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(pending / step["name"], target)
        for step in steps:
            if step["do"] == "remove" and step["was"] is not None:
                target = directory / step["name"]
                if identity(target) == step["was"]:
                    target.unlink()
        sync(directory)
    # From here nothing in the plan matters; renamed, a half-removed one is swept by the next save.
    done = directory / pending.name.replace(COMMIT, STAGE)
    pending.rename(done)
    shutil.rmtree(done, ignore_errors=True)
