"""From a record to windows of tokens with their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from easydel.training.data.batch import IGNORED
from easydel.training.data.chat import ChatEncoder
from easydel.training.data.config import DataConfig
from easydel.training.data.records import Record, Records, field_of


@dataclass(frozen=True)
class Window:
    """A document, or a part of one, that fits a row.

    Attributes:
        ids: int32 `[n]`.
        labels: int32 `[n]`; the label of a token is the token, -100 where it is not to be learned. The first never is:
            nothing of its own document predicts it.
    """

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Document:
    """The windows of a record.

    Attributes:
        windows: in order; none if no label is left.
        dropped: tokens of the record that are in no window.
        closes: whether the document ends with this record (a large text is several records).
    """

    windows: tuple[Window, ...]
    dropped: int
    closes: bool = True


class DocumentMaker:
    """Makes documents of records, as a config says.

    Texts and prompts get the special tokens that the tokenizer itself puts around a text (a begin token, if it has that
    habit); conversations are tokenised as their template renders them, with nothing added.

    Args:
        config: with a `format` that is not `"auto"`.
        tokenizer: with transformers' interface.
        records: for error messages.

    Raises:
        ValueError: the tokenizer lacks what the config asks for.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, records: Records) -> None:
        self.config, self.tokenizer, self.records = config, tokenizer, records
        if config.reads_text and config.completion_only:
            raise ValueError(
                f"completion_only=True is for chats and prompts; format {config.format!r} has no completion"
            )
        if config.add_eos and config.format != "chat" and tokenizer.eos_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no end token: use DataConfig(add_eos=False)")
        if config.window_start == "bos" and tokenizer.bos_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no begin token: use DataConfig(window_start='overlap')")
        self.chat = ChatEncoder(tokenizer, config.chat_template) if config.format == "chat" else None
        self.prefix, self.suffix = _special_tokens(tokenizer)

    def __call__(self, record: Record) -> Document:
        """Tokenise a record and cut it into windows.

        Raises:
            ValueError: it cannot be read, has nothing to learn, or is too long for `truncate="error"`; the message says
                where it stands.
            TypeError: a field has another type.
        """
        ids, learned = self._encode(record)
        labels = np.where(learned, ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED
        if record.opens and record.closes and not (labels != IGNORED).any():
            raise ValueError(
                f"{self._where(record)}: no trainable token (of {len(ids)}): the text or completion is empty, or no "
                "message is the assistant's"
            )
        numbered = enumerate(self._cut(ids, labels, record))
        kept = {number: window for number, window in numbered if (window.labels != IGNORED).any()}
        held = sum(len(window.ids) - (number > 0) for number, window in kept.items())  # a later one's head is no news
        return Document(tuple(kept.values()), len(ids) - held, record.closes)

    def _cut(self, ids: np.ndarray, labels: np.ndarray, record: Record) -> list[Window]:
        length, truncation = self.config.sequence_length, self.config.truncation
        if len(ids) > length and truncation == "error":
            raise ValueError(
                f"{self._where(record)}: {len(ids)} tokens do not fit rows of {length}: raise sequence_length, or set "
                "truncate to 'right' or 'split'"
            )
        windows = [Window(ids[:length], labels[:length])]
        if truncation == "split":
            for place in range(length, len(ids), length - 1):
                head = self._head(ids[:place])
                body = slice(place, place + length - 1)
                windows.append(
                    Window(
                        np.concatenate([head, ids[body]]).astype(np.int32),
                        np.concatenate([[IGNORED], labels[body]]).astype(np.int32),
                    )
                )
        return windows

    def _head(self, before: np.ndarray) -> np.ndarray:
        """Return the token that a window begins with which goes on behind `before`."""
        if self.config.window_start == "bos":
            return np.array([self.tokenizer.bos_token_id], np.int32)
        return before[-1:]

    def _encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens, int32 `[n]`, and which are to be learned, bool `[n]`."""
        config, value = self.config, record.value
        if config.format == "text":
            if not isinstance(value, str):
                raise TypeError(f"{self._where(record)}: a text was expected, got {type(value).__name__}")
            return self._text(record, value)
        if not isinstance(value, Mapping):
            raise TypeError(f"{self._where(record)}: a mapping was expected, got {type(value).__name__}")
        if config.format == "jsonl":
            return self._text(record, self._field(record, config.text_field, str))
        if config.format == "prompt":
            return self._prompt(record)
        assert self.chat is not None
        messages = self._field(record, config.messages_field, list)
        try:
            ids, mask = self.chat.encode(messages, value.get("tools"), masked=config.labels_completions_only)
        except ValueError as error:
            raise ValueError(f"{self._where(record)}: {error}") from error
        return ids, np.ones(len(ids), bool) if mask is None else mask

    def _text(self, record: Record, text: str) -> tuple[np.ndarray, np.ndarray]:
        if not text:
            raise ValueError(f"{self._where(record)}: no trainable token: the text is empty")
        body = self._plain(text)
        if record.opens:
            ids = [*self.prefix, *body]
        else:
            ids = [*self._head(np.array(self._plain(record.lead), np.int32)).tolist(), *body]
        ended = self._ended(ids) if record.closes else np.array(ids, np.int32)
        return ended, np.ones(len(ended), bool)

    def _prompt(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise the prompt as it will be when a completion is asked for.

        The completion is tokenised behind it if the tokenizer then keeps the prompt's tokens, else on its own.
        """
        prompt = self._field(record, self.config.prompt_field, str)
        completion = self._field(record, self.config.completion_field, str)
        if not completion:
            raise ValueError(f"{self._where(record)}: no trainable token: the completion is empty")
        head, whole = self._plain(prompt), self._plain(prompt + completion)
        tail = whole[len(head) :] if whole[: len(head)] == head else self._plain(completion)
        ids = self._ended([*self.prefix, *head, *tail])
        learned = np.arange(len(ids)) >= len(self.prefix) + len(head)
        return ids, learned if self.config.labels_completions_only else np.ones_like(learned)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _ended(self, ids: list[int]) -> np.ndarray:
        """Put behind a document what the tokenizer puts there, and the end token if asked for and not there."""
        ids = [*ids, *self.suffix]
        if self.config.add_eos and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        return np.array(ids, np.int32)

    def _field(self, record: Record, name: str, kind: type) -> Any:
        if name in record.value and isinstance(record.value[name], kind):
            return record.value[name]
        return field_of(record.value, name, kind, self._where(record))  # which raises

    def _where(self, record: Record) -> str:
        return self.records.where(record.index)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and behind a text.

    Raises:
        ValueError: it does more than that.
    """
    plain = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    whole = tokenizer.encode("a", add_special_tokens=True, verbose=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(
        f"{type(tokenizer).__name__} does not put its special tokens around a text ('a' is {plain}, with them "
        f"{whole}): such a tokenizer is not supported"
    )
