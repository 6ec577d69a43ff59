"""Documents in files, found by an index of byte offsets and read one by one when they are needed.

Of a file only the index is held: 18 bytes a document. Nothing is decoded until it is asked for.
"""

from __future__ import annotations

import glob
import itertools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 22
MARK = b"\xef\xbb\xbf"  # that some editors write before UTF-8
# Tokenizers take a run of blanks together but for its last, so only single ones are borders of tokens.
_LINE_END = re.compile(rb"[^\s]\n(?=[^\s])")
_WORD_END = re.compile(rb"[^\s](?=[ \n][^\s])")
_CHARACTER = re.compile(rb"(?=[\x00-\x7f\xc0-\xff])")


@dataclass(frozen=True)
class FileIndex:
    """Where the documents of a file, or the pieces of large ones, lie.

    Attributes:
        path: the file.
        starts: int64 `[n]`, first byte of each.
        ends: int64 `[n]`, the byte behind it.
        opens: bool `[n]`, whether a document begins there (else a piece goes on with one).
        closes: bool `[n]`, whether it ends there.
        size: of the file in bytes.
    """

    path: Path
    starts: np.ndarray
    ends: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.starts)


def expand_paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that a path, a glob pattern or a list of them names; a pattern's in alphabetical order.

    Raises:
        ValueError: something names no file.
    """
    files: list[Path] = []
    for entry in [path] if isinstance(path, str | Path) else path:
        pattern = Path(entry).expanduser()
        if pattern.is_dir():
            raise ValueError(f"{entry} is a folder: say which of its files to read, such as '{entry}/*.jsonl'")
        if pattern.is_file():
            found = [pattern]
        elif glob.has_magic(str(pattern)):
            found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
        else:
            found = []
        if not found:
            raise ValueError(f"{entry} names no file (looked from {Path.cwd()})")
        files += found
    if not files:
        raise ValueError("path is an empty list: name at least one file")
    return files


def index_file(path: Path, separator: bytes | None, piece_bytes: int | None = None) -> FileIndex:
    """Find the documents of a file; empty ones, and those of up to 64 blanks, are none.

    Args:
        path: the file.
        separator: what stands between documents; `None`: the file is one.
        piece_bytes: documents much longer than this are cut into pieces of about this size, at the ends of lines or
            else of words; `None`: none are.

    Raises:
        ValueError: the file holds no document.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = len(MARK) if file.read(len(MARK)) == MARK else 0
        starts, ends = _separated(file, first, size, separator)
        if not starts:
            raise ValueError(f"{path} is empty: it holds no document")
        if piece_bytes is None:
            everywhere = np.ones(len(starts), bool)
            arrays = (np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64))
            return FileIndex(path, *arrays, everywhere, everywhere, size)
        cuts = [list(_cut(file, start, end, piece_bytes)) for start, end in zip(starts, ends, strict=True)]
    pieces = [span for document in cuts for span in itertools.pairwise(document)]
    opens = np.concatenate([np.arange(len(document) - 1) == 0 for document in cuts])
    closes = np.append(opens[1:], True)
    pairs = np.array(pieces, np.int64)
    return FileIndex(path, pairs[:, 0].copy(), pairs[:, 1].copy(), opens, closes, size)


def read_span(path: Path, start: int, end: int) -> bytes:
    """Read some bytes of a file; each call opens it anew, so that no handle is held and threads do not meet."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = file.read(end - start)
        while len(data) < end - start and (more := file.read(end - start - len(data))):
            data += more
    if len(data) != end - start:
        raise ValueError(f"{path} has changed since it was indexed: it ends before byte {end}")
    return data


def line_number(path: Path, offset: int) -> int:
    """Return the line (from 1) in which a byte lies. It reads all before it: for error messages."""
    count, left = 1, offset
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def _separated(file: BinaryIO, first: int, size: int, separator: bytes | None) -> tuple[array, array]:
    starts, ends = array("q"), array("q")

    def add(start: int, end: int, data: bytes, base: int) -> None:
        # `data` may lack the beginning of a long document: that one is not blank.
        if end - start > 64 or data[max(start - base, 0) : end - base].strip():
            starts.append(start)
            ends.append(end)

    if separator is None:
        if size > first:
            file.seek(first)
            add(first, size, file.read(65), first)
        return starts, ends
    find, width = re.compile(re.escape(separator)).finditer, len(separator)
    start, kept, base = first, b"", first
    file.seek(first)
    while chunk := file.read(CHUNK):
        data, done = kept + chunk, 0
        for match in find(data):
            add(start, base + match.start(), data, base)
            done = match.end()
            start = base + done
        # What may be the whole of a blank document, and the first part of a separator behind it, is looked at again.
        keep = max(done, len(data) - 64 - width)
        kept, base = data[keep:], base + keep
    if start < size:
        add(start, size, kept, base)
    return starts, ends


def _cut(file: BinaryIO, start: int, end: int, piece_bytes: int) -> Iterator[int]:
    """Yield the borders of the pieces of a document, its own two included."""
    yield start
    while end - start > piece_bytes * 3 // 2:
        file.seek(start + piece_bytes)
        near = file.read(min(max(piece_bytes // 4, 64), end - start - piece_bytes))
        match = _LINE_END.search(near) or _WORD_END.search(near) or _CHARACTER.search(near)
        if match is None:
            raise ValueError(f"{file.name}: not UTF-8 text near byte {start + piece_bytes}; convert it first")
        start += piece_bytes + match.end()
        yield start
    yield end
