"""Text in pieces: joined it is the text of all tokens, and nothing that was given out changes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from easydel.assets import embedded_model_path
from easydel.generation.text_pieces import TextPieces
from easydel.hub.tokenizer import load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["do", " n't", " '", " 've", " .", " ,", " ", "n", " n", "'", "t", "é", "▁a", "▁", "\n"]


def of_words(decoder: Any, words: list[str], **settings: Any) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", **settings)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
TOKENIZERS = {
    "bytes": lambda: load_tokenizer(embedded_model_path()),
    "cleans up": lambda: of_words(decoders.Fuse(), WORDS, clean_up_tokenization_spaces=True),
    "bytes beside words": lambda: of_words(LLAMA, [*WORDS, *BYTES]),
    "word pieces": lambda: of_words(decoders.WordPiece(), ["do", "##n", "'", "t", ".", ",", "##é"]),
}


def pieces_of(tokenizer: Any, ids: Any, together: int = 1) -> list[str]:
    pieces = TextPieces(tokenizer)
    return [*(pieces.add(ids[place : place + together]) for place in range(0, len(ids), together)), pieces.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("together", [1, 3])
def test_any_tokens_join_to_their_text(kind: str, together: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    generator = np.random.default_rng(0)
    words = sorted(index for token, index in tokenizer.get_vocab().items() if token not in BYTES)  # else in any order
    for length in (1, 2, 7, 40, 200):
        for _ in range(10):
            ids = generator.choice(words, length)
            assert "".join(pieces_of(tokenizer, ids, together)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_cleaning_makes_of_an_apostrophe_between_spaces_is_not_given_out_early() -> None:
    """`" n ' t"` becomes `" n't"`, and that `"n't"`."""
    tokenizer = TOKENIZERS["cleans up"]()
    for words in itertools.product(["do", " n", " '", " ", "t"], repeat=5):
        ids = [tokenizer.get_vocab()[word] for word in words]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids), words


@pytest.mark.parametrize("kind", ["bytes", "bytes beside words"])
@pytest.mark.parametrize("text", ["é ↔ 数 🙂", "数" * 70 + "é", "🙂🙂 " * 40])
def test_no_character_is_split(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    if kind == "bytes":
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:  # a word first, for the first loses its space
        ids = tokenizer.convert_tokens_to_ids(["do", *(f"<0x{byte:02X}>" for byte in text.encode())])
        text = "do" + text
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(list(filter(None, pieces))) >= len(set(text.split()))


def test_a_word_is_given_out_at_once_and_a_space_that_may_vanish_is_not() -> None:
    tokenizer = TOKENIZERS["cleans up"]()
    ids = tokenizer.convert_tokens_to_ids(["do", " n", "'", "t", " ", " .", "do", " ", "do"])
    assert tokenizer.decode(ids) == "don't .do do", "the example shows what it is to show"
    assert pieces_of(tokenizer, ids) == ["do", "", "", "n't", "", " .", "do", "", " do", ""]


def test_bytes_that_are_never_completed_come_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes beside words"]()
    ids = tokenizer.convert_tokens_to_ids(["do", *(f"<0x{byte:02X}>" for byte in "é".encode()), "<0xE4>"])
    # Decoded at once, all three bytes are broken for the last one's sake; what was shown is not taken back.
    assert tokenizer.decode(ids) == "do" + 3 * "\ufffd"
    assert pieces_of(tokenizer, ids) == ["do", "", "é", "", "\ufffd"]


def test_special_tokens_are_left_out_and_do_not_take_the_next_words_space() -> None:
    tokenizer = TOKENIZERS["bytes beside words"]()
    ids = tokenizer.convert_tokens_to_ids(["do", *["<end>"] * 100, "▁a", *["<end>"] * 100, "▁a"])
    assert "".join(pieces_of(tokenizer, ids)) == "do a a"


def test_the_time_for_a_piece_does_not_grow() -> None:
    tokenizer, longest = TOKENIZERS["bytes"](), 0

    class Watched:
        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer.encode("for x in range(10): print(x)\n" * 60, add_special_tokens=False)
    assert len(ids) > 500
    assert "".join(pieces_of(Watched(), ids)) == tokenizer.decode(ids)
    assert longest <= 70
