"""Conversations as tokens, with a mask of what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Renders conversations by a template and finds the assistant's turns in them.

    A template that marks them by `{% generation %}` is followed. With any other, a turn is what stands behind the
    conversation before it, rendered with the generation prompt (what the model is given when it is its turn), up to the
    mark that ends the turn; a template whose turns do not lie like that is refused.

    Args:
        tokenizer: with transformers' interface.
        template: a Jinja template; `None`: the tokenizer's.

    Raises:
        ValueError: there is no template.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        if template is None and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no chat template: give one by DataConfig(chat_template=…), or save it "
                "with the tokenizer"
            )
        self.tokenizer, self.template = tokenizer, template

    def encode(self, messages: Sequence[Any], tools: Any, *, masked: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens of a conversation, int32 `[n]`, and which are the assistant's, bool `[n]`, if `masked`.

        A token of which a part belongs to the assistant is the assistant's.

        Raises:
            ValueError: the messages are malformed, the template refuses them, or turns cannot be told apart.
        """
        _check_messages(messages)
        try:
            if not masked:
                text = self._render(messages, tools)
                ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
                return np.array(ids, np.int32), None
            text, spans = self._spans(messages, tools)
        except (TemplateError, TypeError) as error:  # a TypeError: it joins a content that is no text to one
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell which characters a token stands for, so the "
                "assistant's cannot be found: use a fast tokenizer, or DataConfig(completion_only=False)"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), bool)
        for start, end in spans:
            mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return np.array(encoded["input_ids"], np.int32), mask

    def _render(self, messages: Sequence[Any], tools: Any, *, generation_prompt: bool = False) -> str:
        options = {"tools": tools, "chat_template": self.template, "add_generation_prompt": generation_prompt}
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)

    def _spans(self, messages: Sequence[Any], tools: Any) -> tuple[str, list[Span]]:
        template = self.tokenizer.get_chat_template(self.template, tools)
        if not _GENERATION.search(template):
            return self._turns(messages, tools)
        from transformers.utils.chat_template_utils import render_jinja_template

        # What apply_chat_template itself calls. Its own mask of tokens misses the last bytes of a turn that ends in a
        # character of several tokens.
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in spans[0]]

    def _turns(self, messages: Sequence[Any], tools: Any) -> tuple[str, list[Span]]:
        text, spans = self._render(messages, tools), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, generation_prompt=True)
            through = self._render(messages[: number + 1], tools)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"the chat template renders message {number} otherwise when more follows, or not behind its "
                    "generation prompt, so the assistant's part cannot be told: mark it by {% generation %} … "
                    "{% endgeneration %} in DataConfig(chat_template=…)"
                )
            turn, content = through[len(before) :], message.get("content")
            prompted = before != self._render(messages[:number], tools)
            if not prompted and not (isinstance(content, str) and turn.strip().startswith(content.strip())):
                raise ValueError(
                    f"the chat template has no generation prompt, so where the assistant's part of message "
                    f"{number} begins cannot be told: mark it by {{% generation %}} in DataConfig(chat_template=…)"
                )
            spans.append((len(before), len(before) + len(_through_mark(turn, content))))
        return text, spans


def _through_mark(turn: str, content: Any) -> str:
    """Cut a turn behind the mark that ends it; blanks behind a mark are the template's, those without one are it."""
    marked = turn.rstrip()
    said = content.rstrip() if isinstance(content, str) else ""
    has_mark = marked and not (said and marked.endswith(said))
    return marked if has_mark else turn


def _check_messages(messages: Sequence[Any]) -> None:
    if not messages:
        raise ValueError("the list of messages is empty")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {number} must be a mapping with a 'role' and a 'content', got {str(message)[:80]!r}"
            )
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"message {number} (role {message['role']!r}) has no 'content'")
