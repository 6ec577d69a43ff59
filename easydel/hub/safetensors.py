"""Reading and writing the safetensors format: a checked table of tensors, and the bytes of one of them.

A safetensors file is `u64 header length | JSON header | tensor bytes`. Everything a header says is checked against
the file before any tensor is read, so that a truncated or lying file is an error and never a silent load. No torch.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from easydel.errors import CheckpointError
from easydel.hub.report import short

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
        "BOOL": np.bool_, "C64": np.complex64,
    }.items()
}  # fmt: skip
NAMES = {kind: name for name, kind in DTYPES.items()}

# Parsed JSON takes up to about 20 times its text, so this bounds what a hostile header can make us allocate; headers
# of real shards are a few hundred kilobytes.
MAX_HEADER_BYTES = 32 * 2**20
ALIGNMENT = 64  # what XLA's CPU client needs to adopt a buffer instead of copying it
Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `stop` are byte offsets in `file`; `stamp` tells whether the file changed."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    stamp: tuple[int, int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return self.stop - self.start

    def read(self, index: Index | None = None, *, exact: bool = False) -> np.ndarray:
        """Return the tensor, or the block `index` of it, in memory of its own (64-byte aligned, contiguous).

        Args:
            index: one slice per dimension with step 1; `None` reads all of it.
            exact: ask the system for no byte outside the block. Else whole pages are mapped, which is faster where
                what lies between is read by this process, too.

        Raises:
            CheckpointError: the file vanished, shrank or was replaced since its header was read.
        """
        try:
            with self.file.open("rb", buffering=0) as stream:
                if self.stamp is not None and file_stamp(stream.fileno()) != self.stamp:
                    raise CheckpointError(f"{self.file}: the file was replaced while it was being loaded; load again")
                array = _read_block(stream, self, index, exact)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot read tensor {short(self.name)}: {error}") from error
        return array


def file_stamp(descriptor: int) -> tuple[int, int, int]:
    """Return (inode, size, modification time) of an open file."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array whose memory starts at a multiple of 64 bytes."""
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def _read_block(stream: BinaryIO, entry: TensorEntry, index: Index | None, exact: bool) -> np.ndarray:
    bounds = [part.indices(size)[:2] for part, size in zip(index or (), entry.shape, strict=index is not None)]
    block = tuple(max(stop - start, 0) for start, stop in bounds) if index is not None else entry.shape
    # Only whole rows are wanted (always so for a full read): they are one run of bytes.
    if block[1:] == entry.shape[1:]:
        row = prod(entry.shape[1:]) * entry.dtype.itemsize
        array = aligned_empty(block, entry.dtype)
        _fill(stream, entry, _bytes_of(array), entry.start + (bounds[0][0] * row if bounds else 0))
    else:
        array = aligned_empty(block, entry.dtype)
        if array.size and exact:
            _fill_runs(stream, entry, array, bounds)
        elif array.size:
            # Pages of a map count as resident, so it lives only for this copy.
            mapped = np.memmap(stream, np.uint8, "r", offset=entry.start, shape=(entry.nbytes,))
            array[...] = mapped.view(entry.dtype).reshape(entry.shape)[tuple(slice(*bound) for bound in bounds)]
    if entry.dtype == np.bool_:
        array = array.view(np.uint8) != 0
    return array


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fill(stream: BinaryIO, entry: TensorEntry, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(stream.fileno(), [view[done : done + 2**30]], offset + done)
        if count == 0:
            raise CheckpointError(f"{entry.file}: the file ends inside tensor {short(entry.name)}; fetch it again")
        done += count


def _fill_runs(stream: BinaryIO, entry: TensorEntry, array: np.ndarray, bounds: Sequence[tuple[int, int]]) -> None:
    """Read a block run by run: each is what lies together in the file."""
    steps = [prod(entry.shape[n + 1 :]) * entry.dtype.itemsize for n in range(len(entry.shape))]  # bytes
    inner = len(bounds) - 1
    while bounds[inner] == (0, entry.shape[inner]):  # a block of whole rows does not come here
        inner -= 1
    run = (bounds[inner][1] - bounds[inner][0]) * steps[inner]
    first, view = entry.start + bounds[inner][0] * steps[inner], _bytes_of(array)
    for number, place in enumerate(itertools.product(*(range(*bound) for bound in bounds[:inner]))):
        offset = first + sum(n * step for n, step in zip(place, steps, strict=False))
        _fill(stream, entry, view[number * run : (number + 1) * run], offset)


def unique_json(text: str | bytes, where: str) -> Any:
    """Parse JSON in which no object may name a key twice; `where` begins the error message.

    Raises:
        CheckpointError: not JSON, not UTF-8, too deeply nested, or a key occurs twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            twice = [key for key, count in Counter(key for key, _ in items).most_common(5) if count > 1]
            raise CheckpointError(f"{where}: names occur twice: {', '.join(map(short, twice))}; the file is damaged")
        return table

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); the file is damaged, fetch it again") from error


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the table of all tensors in a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not describe it exactly; file, tensor and
            cure are named.
    """
    try:
        with file.open("rb") as stream:
            stamp = file_stamp(stream.fileno())
            size = stamp[1]
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or 8 + length > size:
                raise CheckpointError(
                    f"{file}: truncated: it has {size} bytes but its header alone needs {8 + length}; fetch it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed; "
                    "this is no safetensors file"
                )
            header = unique_json(stream.read(length), f"{file} (header)")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")
    entries = [_entry(name, fields, file, 8 + length, stamp) for name, fields in header.items()]
    return {entry.name: entry for entry in _contiguous(entries, file, 8 + length, size)}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, fields: Any, file: Path, base: int, stamp: tuple[int, int, int]) -> TensorEntry:
    where = f"{file}: tensor {short(name)}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly the fields dtype, shape, data_offsets; got {short(fields)}")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {short(kind)} is not supported; known: {', '.join(DTYPES)}. Convert the checkpoint"
        )
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: shape {short(shape)} is not a list of at most 32 non-negative integers")
    counts = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
    if not counts or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {short(offsets)} are not [start, stop] with 0 <= start <= stop")
    dtype, (start, stop) = DTYPES[kind], offsets
    needed = prod(shape) * dtype.itemsize
    if stop - start != needed:
        raise CheckpointError(
            f"{where}: {kind}{shape} takes {needed} bytes, but its data_offsets hold {stop - start}; the header lies"
        )
    return TensorEntry(name, dtype, tuple(shape), file, base + start, base + stop, stamp)


def _contiguous(entries: list[TensorEntry], file: Path, base: int, size: int) -> Iterator[TensorEntry]:
    end, previous = base, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.stop > size:
            raise CheckpointError(
                f"{file}: tensor {short(entry.name)} ends at byte {entry.stop} but the file has {size}; "
                "it is truncated, fetch it again"
            )
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {short(entry.name)} {what} {previous}; the header lies, fetch it again"
            )
        end, previous = entry.stop, short(entry.name)
        yield entry
    if end != size:
        raise CheckpointError(f"{file}: {size - end} bytes after the last tensor belong to none; fetch it again")


def header_bytes(tensors: Mapping[str, tuple[np.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file that holds `tensors` (name → dtype, shape) one after the other.

    Raises:
        CheckpointError: a dtype that the format does not know (4-bit codes must be packed into uint8).
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in NAMES:
            raise CheckpointError(f"tensor {short(name)}: safetensors cannot hold {dtype}; cast or pack it first")
        stop = start + prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
