"""Tokens into text, piece by piece: what is given out does not change any more."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

_BROKEN = "\ufffd"  # what a decoder makes of the bytes of a character that is not complete
# Tokenizers that clean up spaces make "." of " .", "'" of " ' ", then "n't" of " n't" and so on: what may begin one.
_MAY_SHRINK = re.compile(r" +n? *('[vr]?)?\Z")
_CONTEXT = 32


class TextPieces:
    """Turns tokens into pieces of text that, joined, are the text of all of them, without special tokens.

    Held back is what later tokens may still change: the bytes of a character that is not complete and, if the tokenizer
    cleans up spaces (`" ."` becomes `"."`), a space at the end. Tokens are decoded behind `_CONTEXT` earlier ones or
    more, not behind all of them: the time for a piece does not grow with the answer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._tokens: list[int] = []  # those decoded together
        self._shown = ""  # of their text
        self._settled = 0  # how many of them have all their text shown
        self._mark = 0  # a place between settled tokens, from where on the next context will begin

    def add(self, tokens: Iterable[int]) -> str:
        """Take further tokens; return the text that is settled with them, perhaps none."""
        self._tokens.extend(int(token) for token in tokens)
        text = self._decode(self._tokens)
        ready = text.rstrip(_BROKEN)
        if self._cleans_up:
            ready = _MAY_SHRINK.sub("", ready)
        if not ready.startswith(self._shown):  # a run of bytes that began well is not complete
            return ""
        piece, self._shown = ready[len(self._shown) :], ready
        if ready == text:
            self._settle()
        return piece

    def end(self) -> str:
        """Return what was held back."""
        text = self._decode(self._tokens)
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        return self._decode(self._tokens[self._settled :])  # bytes that were never completed

    def _settle(self) -> None:
        self._settled = len(self._tokens)
        if self._settled - self._mark < _CONTEXT:
            return
        kept = self._tokens[self._mark :]
        text = self._decode(kept)
        # The first word of a text may lose its space: context without any text is none.
        if text:
            self._tokens, self._shown, self._settled = kept, text, len(kept)
        self._mark = len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def text_of(steps: Iterable[np.ndarray], tokenizer: Any) -> Generator[str]:
    """Yield a piece of text, perhaps empty, for each step's tokens, int32 `[1]`, and one for what was held back."""
    pieces = TextPieces(tokenizer)
    for tokens in steps:
        yield pieces.add(tokens)
    yield pieces.end()
