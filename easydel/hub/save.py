"""Module to Hugging Face files: the weight map backwards, tensor by tensor, switched in atomically."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.distributed import by_first, from_all, together, whole
from easydel.errors import CheckpointError
from easydel.hub.commit import commit, locked, sync
from easydel.hub.files import explained, recover_all, staged
from easydel.hub.quantized import file_links
from easydel.hub.resolve import INDEX, SINGLE, TEMPLATES, TOKENIZER_FILES, check_inside, read_index
from easydel.hub.safetensors import header_bytes
from easydel.hub.weight_map import Link, stored_variables
from easydel.stacked import Held

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", re.IGNORECASE)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class _Tensor:
    link: Link
    position: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save_module(
    module: nnx.Module,
    directory: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    extra_files: Mapping[str, str | bytes] | None = None,
    source_dir: str | Path | None = None,
) -> None:
    """Write `module` in the Hugging Face layout into `directory`, replacing a model there all at once or not at all.

    Tensors are gathered and written one at a time; with several processes, the files are shared out among them. The
    user's other files stay; the files of the replaced model
    (index and the shards it lists, or `model.safetensors`) go once the new ones are in place. `commit.py` states
    the protocol.

    Args:
        module: what to write; random states, caches and `persistent=False` variables are left out.
        directory: a new or an existing directory.
        max_shard_size: bytes, or a string such as "5GB"; a larger model is split, a larger tensor stands alone.
        extra_files: name → content of files to write along (`config.json`, `generation_config.json`, ...).
        source_dir: where the model came from; its tokenizer, processor and chat-template files are copied unless
            `directory` has its own.

    Raises:
        CheckpointError: `directory` is a file, read-only or too full, or a dtype cannot be stored; nothing is changed.
        ValueError: `max_shard_size` cannot be understood.
    """
    limit, directory = parse_size(max_shard_size), Path(directory)
    extras = {name: text.encode() if isinstance(text, str) else text for name, text in (extra_files or {}).items()}
    for name in extras:
        check_inside(name, "extra_files")
    tensors, variables = _tensors(module), stored_variables(module)
    shards = _split(tensors, limit)
    needed = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(len, extras.values()))
    with staged(directory, needed) as stage:

        def write() -> None:
            with explained(directory):
                _write_shards(stage, shards, variables)

        def finish() -> None:
            with explained(directory):
                names = _write_small(stage, directory, extras, Path(source_dir) if source_dir else None)
                with locked(directory):
                    recover_all(directory)
                    _switch(directory, stage, shards, names)

        together(write)
        by_first(finish)


def _switch(directory: Path, stage: Path, shards: Mapping[str, Mapping[str, _Tensor]], names: list[str]) -> None:
    """Commit what is staged: shards, the small files, and last the one file by which a reader sees the weights."""
    if SINGLE not in shards:
        shards = _write_index(directory, stage, shards)
    weights = [name for name in shards if name != SINGLE]
    switch = SINGLE if SINGLE in shards else INDEX
    first = [SINGLE] if switch == INDEX and (directory / SINGLE).exists() else []
    stale = [name for name in _old_files(directory) if name not in (*shards, *first, switch)]
    commit(directory, stage, [*weights, *names, switch], stale, first)


def _write_index(
    directory: Path, stage: Path, shards: Mapping[str, Mapping[str, _Tensor]]
) -> Mapping[str, Mapping[str, _Tensor]]:
    """Stage the index; return the shards under the names they will have, none of which is in use."""
    if any((directory / name).exists() for name in shards):
        # Shards must not overwrite those of the model they replace before the index does.
        tag = uuid.uuid4().hex[:8]
        fresh = {name: name.replace("model-", f"model-{tag}-") for name in shards}
        for name, new in fresh.items():
            (stage / name).rename(stage / new)
        shards = {fresh[name]: members for name, members in shards.items()}
    total = sum(tensor.nbytes for members in shards.values() for tensor in members.values())
    weight_map = {tensor: shard for shard, members in shards.items() for tensor in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (stage / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return shards


def parse_size(size: str | int, name: str = "max_shard_size") -> int:
    """Return a size in bytes from `5_000_000` or `"5MB"` (decimal units, as in transformers).

    Args:
        size: in either form.
        name: of the argument, for the message.

    Raises:
        ValueError: it cannot be understood.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{name}={size!r}: expected a positive number of bytes or e.g. '5GB', '500MB'")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def _tensors(module: nnx.Module) -> dict[str, _Tensor]:
    variables, tensors = stored_variables(module), {}
    for link in file_links(module):
        dtypes = link.source_dtypes or (variables[link.targets[0]].dtype,) * len(link.sources)
        for position, (name, shape) in enumerate(zip(link.sources, link.source_shapes, strict=True)):
            tensors[name] = _Tensor(link, position, np.dtype(dtypes[position]), shape)
    if not tensors:
        raise CheckpointError(f"{type(module).__name__} has no variables to save")
    return tensors


def _split(tensors: Mapping[str, _Tensor], limit: int) -> dict[str, dict[str, _Tensor]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda t: t.nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )  # fmt: skip
    return {file: {name: tensors[name] for name in names} for file, names in plan.filename_to_tensors.items()}


def host_array(array: jax.Array, *, wanted: bool = True) -> np.ndarray:
    """Return the whole array on the host without jax keeping a copy of it.

    `np.asarray` of a sharded array caches the gathered copy inside it, so that saving would leave the model in host
    memory once more; the cache of a second array over the same buffers goes away with it.

    Args:
        array: on any devices; if parts of it lie with other processes, all must call this.
        wanted: whether this process needs it, see `easydel.distributed.whole`.
    """
    if not array.is_fully_addressable:
        return whole(array, wanted=wanted)
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def link_arrays(link: Link, variables: Mapping[str, Held], *, wanted: bool = True) -> list[np.ndarray]:
    """Return the arrays of a link's sources, in the file's layout (possibly views); none where they are not wanted."""
    arrays = [host_array(variables[path].get_value(), wanted=wanted) for path in link.targets]
    return link.transform.save(arrays) if wanted else []


def iterate_tensors(
    tensors: Mapping[str, _Tensor], variables: Mapping[str, Held], *, wanted: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, contiguous array) one at a time; a link of several sources is gathered once.

    Where they are not `wanted`, the arrays are empty.
    """
    nothing = np.empty(0, np.uint8)
    held: tuple[Link, list[np.ndarray]] | None = None
    for name, tensor in tensors.items():
        if held is None or held[0] is not tensor.link:
            held = None  # one tensor at a time
            held = (tensor.link, link_arrays(tensor.link, variables, wanted=wanted))
        yield name, np.ascontiguousarray(held[1][tensor.position]) if wanted else nothing


def _write_shards(stage: Path, shards: Mapping[str, Mapping[str, _Tensor]], variables: Mapping[str, Held]) -> None:
    """Write the files of a model, each by one process; the others hand it their parts, a tensor at a time.

    Those that do not see process 0's stage, as they have other disks, write none.
    """
    writers = [process for process, sees in enumerate(from_all(int(stage.is_dir()))) if sees]
    problem: OSError | None = None
    for number, (name, members) in enumerate(shards.items()):
        writes = writers[number % len(writers)] == jax.process_index() and problem is None
        content = _shard_content(members, variables, wanted=writes)
        if writes:
            try:
                _write_shard(stage / name, content)
            except OSError as error:
                if jax.process_count() == 1:
                    raise
                problem = error
        for _ in content:  # the others wait for this process's parts
            pass
    if problem is not None:
        raise problem


def _write_shard(file: Path, content: Iterator[Any]) -> None:
    with file.open("wb") as stream:
        for part in content:
            stream.write(part)
            del part  # or it would live until the next one has been gathered
    if jax.process_count() > 1:  # only this process can flush what it wrote, and process 0 commits
        sync(file)


def _shard_content(tensors: Mapping[str, _Tensor], variables: Mapping[str, Held], *, wanted: bool) -> Iterator[Any]:
    """Yield the bytes of a file, tensor by tensor; where they are not wanted, nothings in their place."""
    # The largest item size first keeps every tensor aligned, as the reference writer does.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in ordered.items()}
    yield header_bytes(table, {"format": "pt"})
    for _, array in iterate_tensors(ordered, variables, wanted=wanted):
        yield array.reshape(-1).view(np.uint8).data
        del array  # as in `_write_shard`


def _write_small(stage: Path, directory: Path, extras: Mapping[str, bytes], source: Path | None) -> list[str]:
    """Stage the extra files and what the source carries along; return their names."""
    names = [name for name in extras if _differs(directory / name, extras[name])]
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(extras[name])
    if source is not None and source.is_dir():
        carried = [*TOKENIZER_FILES, *sorted(f"{TEMPLATES}/{p.name}" for p in (source / TEMPLATES).glob("*.jinja"))]
        for name in carried:
            if (source / name).is_file() and name not in extras and not (directory / name).exists():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, stage / name)
                names.append(name)
    return names


def _differs(file: Path, content: bytes) -> bool:
    return not file.is_file() or file.read_bytes() != content


def _old_files(directory: Path) -> list[str]:
    """Return the weight files of the model that `directory` holds now; never one that a link leads out to."""
    old = [SINGLE] if (directory / SINGLE).exists() else []
    if (directory / INDEX).is_file():
        old.append(INDEX)
        with contextlib.suppress(CheckpointError):  # a broken index names nothing we could trust
            shards = sorted(set(read_index(directory / INDEX, ".safetensors").values()))
            old += [name for name in shards if (directory / name).parent.resolve() == directory.resolve()]
    return old
