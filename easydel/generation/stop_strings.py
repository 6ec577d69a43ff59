"""Strings that end an answer, found while tokens are made.

Text is never put together: an automaton that looks for the strings (Aho and Corasick, "Efficient string matching",
1975) is run over the bytes of every token of the vocabulary, from each of its states, before anything is generated.
What is left for the loop is one look-up in a table `[states, vocab]`.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_PREFIX = "abcdef"
_FEWEST_STATES = 16


@dataclass(frozen=True, eq=False)
class StopTable:
    """What each token does in each state.

    Attributes:
        moves: int32 `[states, vocab]` on the host: the state after the token, or `-1 - state` if a string ends in it.
        on_device: the same, placed once.
        longest: bytes of the longest string.
        sizes: int32 `[vocab]`, bytes of each token.
    """

    moves: np.ndarray
    on_device: jax.Array
    longest: int
    sizes: np.ndarray

    def states_after(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the states after prompts, int32 `[rows]`: a string may begin in a prompt.

        Args:
            ids: int32 `[rows, seq]`.
            mask: bool `[rows, seq]`, false where one is padding.
        """
        out = np.zeros(len(ids), np.int32)
        for row, keep in enumerate(mask):
            tokens = ids[row][keep]
            for token in tokens[self.sizes[tokens] > 0][-self.longest :]:
                move = int(self.moves[out[row], token])
                out[row] = move if move >= 0 else -1 - move
        return out


_TABLES: weakref.WeakKeyDictionary[Any, dict[Any, StopTable]] = weakref.WeakKeyDictionary()
_TEXTS: weakref.WeakKeyDictionary[Any, dict[int, list[bytes]]] = weakref.WeakKeyDictionary()


def stop_table(tokenizer: Any, strings: tuple[str, ...], vocab_size: int) -> StopTable:
    """Return the table of some strings; those made before are kept as long as the tokenizer.

    Args:
        tokenizer: of transformers.
        strings: not empty.
        vocab_size: logits of the model; ids unknown to the tokenizer have no text.
    """
    tables = _TABLES.setdefault(tokenizer, {})
    key = (strings, vocab_size, len(tokenizer))
    if key not in tables:
        texts = _TEXTS.setdefault(tokenizer, {})
        if len(tokenizer) not in texts:
            texts[len(tokenizer)] = token_bytes(tokenizer)
        tables[key] = _table([s.encode() for s in strings], texts[len(tokenizer)], vocab_size)
    return tables[key]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return what each id adds to a text, as UTF-8; of tokens that are parts of characters, their bytes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = getattr(decoder, "__getstate__", lambda: b"")() or b""
    state = state.encode() if isinstance(state, str) else state
    by_fallback, by_level = b"ByteFallback" in state, b"ByteLevel" in state
    alphabet: dict[str, int] = {}
    if by_level and not by_fallback:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    before = tokenizer.convert_ids_to_tokens(tokenizer(_PREFIX, add_special_tokens=False)["input_ids"])
    vocab = tokenizer.get_vocab()
    out = [b""] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if alphabet and all(character in alphabet for character in token):
            out[index] = bytes(alphabet[character] for character in token)
        elif by_fallback and re.fullmatch("<0x[0-9a-fA-F]{2}>", token):
            out[index] = bytes([int(token[3:5], 16)])
        else:  # behind other text, for the first token of a text may lose its space
            text = tokenizer.convert_tokens_to_string([*before, token])
            out[index] = text[text.index(_PREFIX) + len(_PREFIX) :].encode()
    return out


def _table(strings: list[bytes], texts: list[bytes], vocab_size: int) -> StopTable:
    steps, ends = _automaton(strings)
    states, vocab = len(steps), max(vocab_size, len(texts))
    sizes = np.zeros(vocab, np.int32)
    sizes[: len(texts)] = [len(text) for text in texts]
    state = np.repeat(np.arange(states, dtype=np.int32)[:, None], vocab, axis=1)
    ended = np.zeros((states, vocab), bool)
    for place in range(sizes.max(initial=0)):
        going = np.flatnonzero(sizes > place)
        following = np.array([texts[token][place] for token in going])
        state[:, going] = steps[state[:, going], following]
        ended[:, going] |= ends[state[:, going]]
    moves = np.where(ended, -1 - state, state)
    # How many states there are should hardly ever cost a compilation.
    room = max(_FEWEST_STATES, 1 << (states - 1).bit_length())
    moves = np.pad(moves, ((0, room - states), (0, 0)))
    return StopTable(moves, jax.device_put(moves), max(map(len, strings)), sizes)


def _automaton(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the state after each byte, int32 `[states, 256]`, and bool `[states]`: whether a string ends there."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][byte]
        ends[node] = True
    steps = np.zeros((len(children), 256), np.int32)
    fallback = np.zeros(len(children), np.int32)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        ends[node] = ends[node] or ends[fallback[node]]
        if node:
            steps[node] = steps[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = steps[node, byte]
            steps[node, byte] = child
            queue.append(child)
    return steps, np.array(ends)
