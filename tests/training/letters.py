"""A tokenizer of letters: the token of a character is its number, a begin token stands before a text."""

from __future__ import annotations

BEGIN, END, PAD = 1, 2, 0


class LetterTokenizer:
    bos_token_id, eos_token_id, pad_token_id = BEGIN, END, PAD

    def encode(self, text, add_special_tokens=True, verbose=True):
        del verbose
        return [BEGIN] * add_special_tokens + [ord(letter) for letter in text]


def unique_texts(lengths):
    """Return texts of these lengths in which no letter occurs twice."""
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return ["".join(chr(0x4E00 + place) for place in range(end - length, end)) for end, length in zip(ends, lengths)]  # noqa: B905
