"""Records, the raw documents: read from files or given as a sequence, in one order, each with its place."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from easydel.paths import nearest
from easydel.training.data.config import DataConfig
from easydel.training.data.files import FileIndex, expand_paths, index_file, line_number, read_span

LEAD_BYTES = 256
BYTES_PER_TOKEN = 16  # a piece of a large text is this times a row: a few windows, so that an order can be shuffled
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".md", ".text", ".rst")


@dataclass(frozen=True)
class Record:
    """One document as it was found.

    Attributes:
        index: its number.
        value: a text, or the mapping of a JSON line.
        opens: whether a document begins here; else this is a piece that goes on with one.
        closes: whether it ends here.
        lead: the text just before a piece.
    """

    index: int
    value: Any
    opens: bool = True
    closes: bool = True
    lead: str = ""


class Records(Protocol):
    """Records by number, read when asked for."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Read one."""
        ...

    def where(self, index: int) -> str:
        """Say where one stands, for error messages."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what changes if the data do, fit for JSON."""
        ...


class SequenceRecords:
    """Examples held in memory: texts, or mappings as of a JSON line."""

    def __init__(self, examples: Sequence[Any]) -> None:
        if not len(examples):
            raise ValueError("no examples were given: the sequence is empty")
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Record:
        return Record(index, self.examples[index])

    def where(self, index: int) -> str:
        """Say which example it is."""
        return f"example {index}"

    def fingerprint(self) -> dict[str, Any]:
        """Return their number."""
        return {"records": len(self)}


class FileRecords:
    """The documents of some files, JSON lines or texts; only an index of them is held."""

    def __init__(self, files: Sequence[FileIndex], *, is_json: bool) -> None:
        self.files, self.is_json = list(files), is_json
        self.firsts = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Record:
        file, place = self._find(index)
        start, end = int(file.starts[place]), int(file.ends[place])
        opens, closes = bool(file.opens[place]), bool(file.closes[place])
        lead_start = start if opens else max(start - LEAD_BYTES, 0)
        data = read_span(file.path, lead_start, end)
        try:
            text = data[start - lead_start :].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: not UTF-8 text ({error}); convert the file first") from error
        if self.is_json:
            return Record(index, self._parsed(text, index))
        # The lead's first character may be cut in two, which is far from its end, the part that matters.
        return Record(index, text, opens, closes, data[: start - lead_start].decode("utf-8", errors="ignore"))

    def where(self, index: int) -> str:
        """Say in which line of which file it begins."""
        file, place = self._find(index)
        return f"{file.path}:{line_number(file.path, int(file.starts[place]))}"

    def fingerprint(self) -> dict[str, Any]:
        """Return their number, the files' sizes and a checksum of where documents begin."""
        checksum = 0
        for file in self.files:
            checksum = zlib.crc32(file.starts.data, checksum)
        return {"records": len(self), "sizes": [file.size for file in self.files], "starts": checksum}

    def _find(self, index: int) -> tuple[FileIndex, int]:
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.files[number], int(index - self.firsts[number])

    def _parsed(self, text: str, index: int) -> Any:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.where(index)}: broken JSON at column {error.colno} ({error.msg}); "
                "every line must hold one JSON object"
            ) from error
        if not isinstance(value, dict):
            raise ValueError(f"{self.where(index)}: a line must hold a JSON object, got {type(value).__name__}")
        if "\\ud" in text.lower():
            try:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{self.where(index)}: a text holds half a character ({error})") from error
        return value


def open_records(config: DataConfig, examples: Sequence[Any] | None = None) -> tuple[Records, DataConfig]:
    """Index the files of a config (or take the examples), and decide its `format`.

    Returns:
        The records, and the config with a format that is not `"auto"`.

    Raises:
        ValueError: a file is missing or empty, or the format cannot be told or does not fit the files.
    """
    if (config.path is None) == (examples is None):
        got = "neither" if examples is None else "both"
        raise ValueError(f"give either DataConfig(path=…) or a sequence of examples, got {got}")
    if examples is not None:
        sequence = SequenceRecords(examples)
        return sequence, replace(config, format=_format_of(sequence, config))
    assert config.path is not None
    paths = expand_paths(config.path)
    is_json = _holds_json(paths, config)
    if is_json and config.text_separator is not None:
        raise ValueError(f"text_separator is for text files; {paths[0]} holds one document a line")
    if is_json:
        records = FileRecords([index_file(path, b"\n") for path in paths], is_json=True)
        return records, replace(config, format=_format_of(records, config))
    config = replace(config, format="text")
    piece = BYTES_PER_TOKEN * config.sequence_length if config.truncation == "split" else None
    separator = None if config.text_separator is None else config.text_separator.encode()
    return FileRecords([index_file(path, separator, piece) for path in paths], is_json=False), config


def _holds_json(paths: Sequence[Path], config: DataConfig) -> bool:
    if config.format != "auto":
        return config.format != "text"
    kinds = {path.suffix.lower(): path for path in paths}
    for suffix, path in kinds.items():
        if suffix not in (*_JSON_SUFFIXES, *_TEXT_SUFFIXES):
            raise ValueError(
                f"{path}: the format of {suffix or 'a file without suffix'} is unknown (known are "
                f"{', '.join(_JSON_SUFFIXES + _TEXT_SUFFIXES)}): set format='text' for plain text, 'jsonl', 'chat' or "
                "'prompt' for a JSON object a line"
            )
    if len({suffix in _JSON_SUFFIXES for suffix in kinds}) > 1:
        raise ValueError(f"{', '.join(map(str, kinds.values()))}: text and JSON lines cannot be mixed in one path")
    return next(iter(kinds)) in _JSON_SUFFIXES


def _format_of(records: Records, config: DataConfig) -> str:
    """Tell the format by the first record."""
    value = records[0].value
    if isinstance(value, str):
        if config.format not in ("auto", "text"):
            raise ValueError(f"{records.where(0)}: format={config.format!r} needs mappings, got a text")
        return "text"
    if not isinstance(value, Mapping):
        raise TypeError(f"{records.where(0)}: a record must be a text or a mapping, got {type(value).__name__}")
    if config.format == "text":
        raise ValueError(f"{records.where(0)}: format='text' needs texts, got a mapping (use 'jsonl')")
    if config.format != "auto":
        return config.format
    if config.messages_field in value:
        return "chat"
    if config.prompt_field in value and config.completion_field in value:
        return "prompt"
    if config.text_field in value:
        return "jsonl"
    raise ValueError(
        f"{records.where(0)}: the format cannot be told from the fields {', '.join(map(str, value))}: expected "
        f"{config.messages_field!r}, {config.prompt_field!r} with {config.completion_field!r}, or "
        f"{config.text_field!r}; name the right one by DataConfig(text_field=…) or its like"
    )


def field_of(value: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return a field of a record.

    Raises:
        ValueError: it is missing; the nearest are named.
        TypeError: it is of another type.
    """
    if name not in value:
        near = nearest(name, map(str, value))
        raise ValueError(
            f"{where}: no field {name!r}, found {', '.join(map(str, value)) or 'none'}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    if not isinstance(value[name], kind):
        raise TypeError(f"{where}: the field {name!r} must be {kind.__name__}, got {type(value[name]).__name__}")
    return value[name]
