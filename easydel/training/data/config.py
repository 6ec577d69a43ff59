"""`DataConfig`: which documents are read, and how they become rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easydel.fields import read_fields

FORMATS = ("auto", "text", "jsonl", "chat", "prompt")
TRUNCATIONS = (None, "split", "right", "error")
WINDOW_STARTS = ("overlap", "bos")


@dataclass(frozen=True)
class DataConfig:
    """Where training text comes from and how it is cut. Immutable; values are checked when it is made.

    Attributes:
        path: a file, a glob pattern (`"texts/**/*.txt"`), or a list of either; `None` if examples are given to
            `make_loader` themselves.
        format: `"text"` (plain text files), `"jsonl"` (a text in each line's `text_field`), `"chat"` (a list of
            messages in `messages_field`), `"prompt"` (`prompt_field` and `completion_field`), or `"auto"`: by the
            file's suffix, then by the fields of the first record.
        text_field: of a `"jsonl"` record.
        messages_field: of a `"chat"` record.
        prompt_field: of a `"prompt"` record.
        completion_field: of a `"prompt"` record.
        text_separator: what stands between the documents of a text file; `None`: a file is one document.
        sequence_length: tokens of a row, at least 2.
        packing: whether documents share rows (kept apart by `segment_ids`), else each document or window has its own.
        packing_rows: how many unfinished rows are kept open for documents that fit.
        completion_only: whether only assistants' turns or completions are labels; `None`: for chats and prompts.
        truncate: what happens to a document longer than a row. `"split"`: it is cut into windows, each of its tokens
            once a label; `"right"`: its tail is dropped and counted; `"error"`; `None`: split texts, cut chats and
            prompts on the right.
        window_start: what a window that continues a document starts with, as context and never as a label:
            `"overlap"`, the token before it, or `"bos"`, the tokenizer's begin token.
        chat_template: a Jinja template to use in place of the tokenizer's.
        add_eos: whether texts and completions end with the tokenizer's end token (chats end as their template says).
        shuffle: whether each pass over the data has an order of its own, else that of the files.
        seed: of the order, in [0, 2**32).
        epochs: passes over the data; `None`: without end.
        prefetch: batches made ahead in a thread; 0: none.

    Raises:
        ValueError: a value is out of its range or unknown.
        TypeError: a value has another type.
    """

    path: str | Path | Sequence[str | Path] | None = None
    format: str = "auto"
    text_field: str = "text"
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    text_separator: str | None = None
    sequence_length: int = 1024
    packing: bool = True
    packing_rows: int = 16
    completion_only: bool | None = None
    truncate: str | None = None
    window_start: str = "overlap"
    chat_template: str | None = None
    add_eos: bool = True
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before a file is opened."""
        for name, known in (("format", FORMATS), ("truncate", TRUNCATIONS), ("window_start", WINDOW_STARTS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, known))}")
        for name, least in (("sequence_length", 2), ("packing_rows", 1), ("seed", 0), ("prefetch", 0), ("epochs", 1)):
            value = getattr(self, name)
            if value is None and name == "epochs":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("text_field", "messages_field", "prompt_field", "completion_field"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name in ("text_separator", "chat_template"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        for name in ("packing", "completion_only", "add_eos", "shuffle"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "completion_only"):
                raise TypeError(f"{name} must be true or false, got {value!r}")
        if self.text_separator == "":
            raise ValueError("text_separator must not be empty; None makes each text file one document")
        if isinstance(self.path, Sequence) and not isinstance(self.path, str | bytes):
            object.__setattr__(self, "path", tuple(self.path))  # hashable
        entries = self.path if isinstance(self.path, tuple) else () if self.path is None else (self.path,)
        for entry in entries:
            if not isinstance(entry, str | Path):
                raise TypeError(f"path must be a file, a pattern or a list of them, got {entry!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Make it from a mapping, such as a section of a YAML file.

        Raises:
            ValueError: a name is no field (the nearest one is named), or a value has the wrong type.
        """
        return cls(**read_fields(cls, values))

    @property
    def reads_text(self) -> bool:
        """Whether documents are plain texts (once `format` is no longer `"auto"`)."""
        return self.format in ("text", "jsonl")

    @property
    def labels_completions_only(self) -> bool:
        """`completion_only`, decided."""
        return not self.reads_text if self.completion_only is None else self.completion_only

    @property
    def truncation(self) -> str:
        """`truncate`, decided."""
        return self.truncate or ("split" if self.reads_text else "right")
