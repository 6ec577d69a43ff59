"""One checkpoint: arrays by name, and a JSON mapping beside them.

Names are paths such as `params/model/norm/scale`: whoever writes a checkpoint turns what it has (a training state, say)
into such a mapping, so that a mismatch can be spelt out and a checkpoint can be looked into without any class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from easydel.distributed import by_first
from easydel.errors import CheckpointError
from easydel.sharding.rules import summary

Arrays = Mapping[str, jax.Array]
FORMAT = "easydel-arrays-1"


class BrokenCheckpointError(CheckpointError):
    """A checkpoint that is not whole, or damaged."""


def save_arrays(directory: str | Path, arrays: Arrays, metadata: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write one checkpoint; the directory appears when it is whole.

    Args:
        directory: of the checkpoint; it must not exist, or be one that `overwrite` allows to replace.
        arrays: by name.
        metadata: what `json` can write.
        overwrite: replace a checkpoint that is there.

    Raises:
        FileExistsError: the directory exists.
    """
    path = Path(directory).absolute()

    def check() -> None:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{directory}: exists already; choose another directory, or allow overwrite=True")
        path.parent.mkdir(parents=True, exist_ok=True)

    by_first(check)  # or another process might see what the first has begun
    _orbax().save(path, dict(arrays), custom_metadata={"format": FORMAT, **metadata}, overwrite=overwrite)


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Return the JSON mapping of a checkpoint.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    path = Path(directory).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    return contents(path, _orbax().metadata, path)[1]


def load_arrays(directory: str | Path, like: Mapping[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Read a checkpoint, each array to where it will lie.

    Args:
        directory: of the checkpoint.
        like: by name, an array or a `jax.ShapeDtypeStruct` with the sharding that is wanted; of another mesh than it
            was written from, if you like.

    Returns:
        The arrays by name, and the JSON mapping.

    Raises:
        CheckpointError: there is no whole checkpoint, it cannot be read, or it holds other arrays than `like`.
    """
    path = Path(directory).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    return read(path, like, _orbax().metadata, _orbax().load, path)


def read(
    path: Path, like: Mapping[str, Any], look: Callable[[Any], Any], load: Callable[[Any, Any], Any], where: Any
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Read arrays and JSON mapping of a checkpoint at `path` by orbax's functions, which know it as `where`.

    Raises:
        BrokenCheckpointError: it cannot be read.
        CheckpointError: it holds other arrays than `like`.
    """
    held, metadata = contents(path, look, where)
    check_names(held, like, path)
    try:
        return load(where, dict(like)), metadata
    except Exception as error:  # whatever a broken file makes orbax, tensorstore or zarr raise
        raise BrokenCheckpointError(f"{path}: the checkpoint cannot be read: {error}") from error


def contents(path: Path, look: Callable[[Any], Any], where: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return names with shapes and dtypes, and the JSON mapping; see `read`."""
    try:
        metadata = look(where)
    except Exception as error:  # as above
        raise BrokenCheckpointError(f"{path}: not a whole checkpoint: {error}") from error
    about = metadata.custom_metadata
    # orbax passes over files of metadata that it cannot read
    if not isinstance(metadata.metadata, Mapping) or not isinstance(about, Mapping) or about.get("format") != FORMAT:
        raise BrokenCheckpointError(f"{path}: not a whole checkpoint of this library: its metadata cannot be read")
    return metadata.metadata, {name: value for name, value in about.items() if name != "format"}


def check_names(held: Mapping[str, Any], like: Mapping[str, Any], where: str | Path) -> None:
    """Compare what a checkpoint holds with what is wanted.

    Raises:
        CheckpointError: names, shapes or dtypes differ; all are listed together.
    """
    problems = [f"{name}: missing" for name in like.keys() - held.keys()]
    problems += [f"{name}: not expected" for name in held.keys() - like.keys()]
    for name in like.keys() & held.keys():
        got, wanted = (_shape(held[name]), _shape(like[name]))
        if got != wanted:
            problems.append(f"{name}: expected {wanted}, got {got}")
    if problems:
        raise CheckpointError(
            f"{where}: the checkpoint is of something else (another model, optimizer or choice of trainable "
            "parameters):\n  " + summary(sorted(problems))
        )


def _shape(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _orbax() -> Any:
    from orbax.checkpoint import v1  # heavy

    return v1
