"""From a name to a directory of files, and from a directory to one table of tensors."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from easydel.errors import CheckpointError
from easydel.hub.commit import recover
from easydel.hub.report import Problem, describe, raise_problems, short
from easydel.hub.safetensors import TensorEntry, read_header, unique_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "added_tokens.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
MAX_JSON_BYTES = 32 * 2**20


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    adapter: bool = False,
) -> Path:
    """Return the directory that holds a checkpoint: a local one, or a Hub snapshot downloaded as far as needed.

    A save that was interrupted in a local directory is completed first (see `commit.py`).

    Args:
        name_or_path: a directory, or a Hub id such as `org/name`. An existing local path wins.
        revision: branch, tag or commit of the Hub repository.
        subfolder: directory inside the checkpoint.
        token: for private or gated repositories.
        cache_dir: where snapshots are kept; `None` is the Hub's usual place.
        local_files_only: never use the network.
        force_download: fetch again what is cached.
        adapter: of a Hub repository fetch the files of a PEFT adapter, no model's.

    Raises:
        CheckpointError: nothing there, a file where a directory should be, or the Hub refused; the cure is named.
    """
    name = os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("the checkpoint's name is empty; give a directory or a Hub id such as 'org/name'")
    if subfolder:
        check_inside(subfolder, "subfolder")
    local = Path(name).expanduser()
    if os.path.isdir(local):  # unlike pathlib's, these two say no to names that no system allows
        directory = local / subfolder if subfolder else local
        if subfolder and not directory.resolve().is_relative_to(local.resolve()):
            raise CheckpointError(f"{directory}: a link leads out of {local}; load {directory.resolve()} itself")
    elif os.path.exists(local):
        raise CheckpointError(f"{local}: is a file; pass the directory that holds it ({local.parent})")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"{local}: no such directory (and not a Hub id, which looks like 'org/name')")
    else:
        from easydel.hub.download import download_adapter, download_snapshot

        download = download_adapter if adapter else download_snapshot
        directory = download(
            name, subfolder or "", revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the checkpoint has no such subfolder; check subfolder={subfolder!r}")
    recover(directory)
    return directory


def check_inside(name: str, where: str) -> None:
    """Raise unless `name` is a plain relative path that stays inside its directory (on any system)."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts or not path.parts:
            raise CheckpointError(
                f"{where}: {short(name)} is absolute or leaves the checkpoint's directory; it is refused. "
                "Names must be relative and without '..'"
            )
    if not name.isprintable() or any(len(part.encode()) > 255 for part in name.split("/")):
        raise CheckpointError(f"{where}: {short(name)} is no name a file can have here; fetch the checkpoint again")


def check_link(directory: Path, name: str) -> None:
    """Raise if `directory / name` is reached through a link that a checkpoint has no business with.

    People keep shards on another disk and the Hub's cache links every file to its blob, so a link straight to a
    weight file is followed. A folder that is a link out of the directory, and a link to anything else, is refused.
    """
    file, home = directory / name, directory.resolve()
    target = file.resolve()
    if target.is_relative_to(home):
        return
    cache = next((parent.parent for parent in (home, *home.parents) if parent.parent.name == "snapshots"), None)
    blob = cache is not None and target.is_relative_to((cache.parent / "blobs").resolve())
    straight = file.is_symlink() and file.parent.resolve().is_relative_to(home) and target.suffix == file.suffix
    if not blob and not straight:
        raise CheckpointError(
            f"{file}: is a link to {target}, out of the checkpoint's directory; it is refused. Copy the file in"
        )


def checkpoint_table(directory: str | Path) -> dict[str, TensorEntry]:
    """Return every tensor of the checkpoint in `directory` by name.

    As in transformers `model.safetensors` wins over an index; `pytorch_model.bin` is the last resort (needs torch,
    read with `weights_only=True`).

    Raises:
        CheckpointError: no weights, or broken ones; what the index and its shards disagree on is listed together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if (directory / SINGLE).is_file():
        check_link(directory, SINGLE)
        return read_header(directory / SINGLE)
    if (directory / INDEX).is_file():
        weight_map = read_index(directory / INDEX, ".safetensors")
        return _join(weight_map, {f: read_header(directory / f) for f in _shards(directory, weight_map)}, directory)
    if (directory / TORCH_SINGLE).is_file() or (directory / TORCH_INDEX).is_file():
        from easydel.hub.pickled import read_pickled

        if (directory / TORCH_SINGLE).is_file():
            check_link(directory, TORCH_SINGLE)
            return read_pickled(directory / TORCH_SINGLE)
        weight_map = read_index(directory / TORCH_INDEX, ".bin")
        return _join(weight_map, {f: read_pickled(directory / f) for f in _shards(directory, weight_map)}, directory)
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
    raise CheckpointError(
        f"{directory}: no weights: expected {SINGLE}, {INDEX} with its shards, or {TORCH_SINGLE}; it holds {found}"
    )


def read_limited(file: Path) -> bytes:
    """Return the content of a JSON file, if it is a plain file of a size that is safe to parse.

    Raises:
        CheckpointError: no such file, a folder, a device, unreadable, or too large.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: is not a regular file; put the checkpoint's own {file.name} there")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {status.st_size} bytes, more than the {MAX_JSON_BYTES} allowed")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); a checkpoint needs {file.name}") from error


def read_index(file: Path, suffix: str) -> dict[str, str]:
    """Return the `weight_map` (tensor → file name) of an index file, checked to stay in its directory."""
    index = unique_json(read_limited(file), str(file))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: expected an object with a non-empty 'weight_map'; fetch the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(suffix):
            raise CheckpointError(
                f"{file}: tensor {short(tensor)} lies in {short(name)}, which is no {suffix} file name; fetch it again"
            )
        check_inside(name, f"{file}: tensor {short(tensor)}")
    return weight_map


def _shards(directory: Path, weight_map: Mapping[str, str]) -> list[str]:
    shards = sorted(set(weight_map.values()))
    problems = [
        Problem("file", shard, f"holds {sum(name == shard for name in weight_map.values())} tensors", "no such file")
        for shard in shards
        if not (directory / shard).is_file()
    ]
    raise_problems(problems, directory, "The index names files that are not there; download the checkpoint again.")
    for shard in shards:
        check_link(directory, shard)
    return shards


def _join(
    weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorEntry]], directory: Path
) -> dict[str, TensorEntry]:
    problems = []
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            holder = next((name for name, table in shards.items() if tensor in table), "no shard")
            problems.append(Problem("missing", tensor, f"in {shard}", f"in {holder}"))
    for shard, table in shards.items():
        for tensor, entry in table.items():
            listed = weight_map.get(tensor)
            if listed is None:
                found = describe(entry.dtype, entry.shape)
                problems.append(Problem("unexpected", tensor, "listed in the index", found))
            elif listed != shard and tensor in shards[listed]:
                problems.append(Problem("duplicate", tensor, f"only in {listed}", f"also in {shard}"))
    raise_problems(problems, directory, "Index and shards disagree; download the checkpoint again.")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}
