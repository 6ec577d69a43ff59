"""A conversation as a model reads it: through the tokenizer's chat template, or as one running text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Message = dict[str, str]


class Conversation:
    """Messages in turn, the user's and the assistant's, perhaps behind a system message.

    Without a chat template the prompt is the text so far: the system message and each turn on a line of their own, each
    answer right behind the line that it goes on from.

    Args:
        tokenizer: of transformers.
        system: the system message.
        room: tokens that a prompt may have; `None`: any number.

    Raises:
        ValueError: the chat template refuses the system message.
    """

    def __init__(self, tokenizer: Any, system: str | None = None, room: int | None = None) -> None:
        self.messages: list[Message] = []
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self._tokenizer, self._room = tokenizer, room
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._left_out = 0
        if self.has_template:
            self._text([{"role": "user", "content": "?"}])

    def ask(self, text: str) -> tuple[np.ndarray, int]:
        """Add the user's message and return the prompt for its answer.

        Returns:
            Tokens, int32 `[1, n]`, and how many old messages are newly left out because they do not fit any more.

        Raises:
            ValueError: the message does not fit even alone, or the template refuses it; it is not added then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        left_out = self._left_out
        ids = self._encode(messages[left_out:])
        while self._room is not None and len(ids) > self._room:
            if left_out + 2 >= len(messages):
                raise ValueError(f"the message has {len(ids)} tokens, there is room for {self._room}: shorten it")
            left_out += 2  # a question and its answer
            ids = self._encode(messages[left_out:])
        if not ids:
            raise ValueError("the message has no tokens: write something")
        newly, self._left_out, self.messages = left_out - self._left_out, left_out, messages
        return np.array([ids], np.int32), newly

    def answer(self, text: str) -> None:
        """Add the answer to the last message; an empty one takes the message back."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def clear(self) -> None:
        """Forget all messages but the system's."""
        self.messages, self._left_out = [], 0

    def save(self, path: Path) -> None:
        """Write all messages as JSON, a list of `{"role": …, "content": …}`."""
        text = json.dumps([*self._system, *self.messages], indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def _encode(self, messages: list[Message]) -> list[int]:
        # A template writes the begin token itself.
        options = {"add_special_tokens": not self.has_template, "verbose": False}
        return list(self._tokenizer.encode(self._text(messages), **options))

    def _text(self, messages: list[Message]) -> str:
        from jinja2.exceptions import TemplateError

        messages = [*self._system, *messages]
        if not self.has_template:
            return "".join(m["content"] + ("" if m["role"] == "user" else "\n") for m in messages)
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses the roles {', '.join(m['role'] for m in messages)}: {error}"
            ) from error
        return str(text)
