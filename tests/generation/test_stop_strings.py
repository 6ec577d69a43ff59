"""Stop strings: the token that completes one is the token at which transformers' own criterion stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

import easydel
from easydel.generation.stop_strings import stop_table, token_bytes
from easydel.hub.tokenizer import load_tokenizer
from tests.generation.tiny import VOCAB, llama

ASSET = Path(easydel.__file__).parent / "assets" / "stdlib-4m"
PIECES = ["s", "to", "p", "st", "op", "stop", "las", "topper", "pped", " ", "sto", "per", "xstopx", "é", "\n", "."]


def of_pieces(decoder: Any, pieces: list[str]) -> PreTrainedTokenizerFast:
    vocab = {piece: index for index, piece in enumerate(["<unk>", *"abcdef", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {
    "plain": lambda: of_pieces(decoders.Fuse(), PIECES),
    "bytes beside pieces": lambda: of_pieces(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        [*PIECES, "▁stop", "▁", "<0xC3>", "<0xA9>", "<0x73>"],
    ),
    "bytes": lambda: load_tokenizer(ASSET),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("strings", [("stop",), ("top", "stopped", "é"), ("s\n", "sts", "ss", " .")])
def test_stops_where_transformers_stops(kind: str, strings: tuple[str, ...]) -> None:
    tokenizer = TOKENIZERS[kind]()
    table = stop_table(tokenizer, strings, 0)
    criterion = StopStringCriteria(tokenizer, list(strings))
    vocab = tokenizer.get_vocab()
    if kind == "bytes":  # letters and other parts of the strings, as the vocabulary has them
        likely = [
            i for i, text in enumerate(token_bytes(tokenizer)) if text and all(b in b"stop\n .\xc3\xa9" for b in text)
        ]
    else:
        likely = [vocab[piece] for piece in vocab if piece not in "abcdef"]
    generator, hits = np.random.default_rng(0), 0
    for _ in range(40):
        ids = generator.choice(likely, 12)
        state = 0
        for length in range(1, len(ids) + 1):
            want = bool(criterion(torch.tensor(ids[None, :length]), None))
            move = int(table.moves[state, ids[length - 1]])
            assert (move < 0) == want, (kind, tokenizer.decode(ids[:length]), ids[:length])
            state = move if move >= 0 else -1 - move
            hits += want
        (after,) = table.states_after(np.pad(ids[None], ((0, 0), (3, 0))), np.arange(15)[None] >= 3)
        assert after == state, "the state after a prompt is that after its tokens one by one"
    assert hits > 3, "no string was ever completed"


def test_the_text_of_tokens() -> None:
    tokenizer = load_tokenizer(ASSET)
    text = "def é(x):\n    return '😀'  # done"
    pieces = token_bytes(tokenizer)
    assert b"".join(pieces[i] for i in tokenizer.encode(text, add_special_tokens=False)) == text.encode()


class Alphabet:
    """A tokenizer whose tokens are the letters from "a" on."""

    backend_tokenizer = None

    def __len__(self) -> int:
        return VOCAB

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(VOCAB)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 97 for c in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(97 + i) for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def letters(ids: Any) -> str:
    return "".join(chr(97 + int(i)) for i in ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "early_stopping": True}], ids=str)
def test_generation_stops_behind_the_string(options: dict[str, Any]) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 5))
    limit = {"max_new_tokens": 12, **options}
    free = np.asarray(llama().generate(ids, **limit).sequences)
    stop, tokenizer = letters(free[0, 8:10]), Alphabet()
    out = np.asarray(llama().generate(ids, **limit, stop_strings=stop, tokenizer=tokenizer, pad_token_id=0).sequences)
    answer = letters(out[0, 5:])
    assert stop in answer or stop in letters(out[1, 5:])
    if "num_beams" in options:
        return
    assert answer.startswith(letters(free[0, 5:10]))
    assert set(answer[5:]) <= {"a"}, "padding follows"
    # A string that begins in the prompt counts, one that ends there does not.
    across = letters(free[0, 4:6])
    twice = ids[:1].repeat(2, 0)  # the program of two rows is there
    out = llama().generate(twice, **limit, stop_strings=[across, letters(ids[0, 3:5])], tokenizer=tokenizer)
    assert out.sequences.shape == (2, 6)


def test_other_strings_compile_nothing() -> None:
    ids, tokenizer = np.ones((1, 4), int), Alphabet()
    llama().generate(ids, max_new_tokens=4, stop_strings="zzz", tokenizer=tokenizer)
    with easydel.CompilationCounter() as counter:
        llama().generate(ids, max_new_tokens=4, stop_strings=["qqqqq", "xy"], tokenizer=tokenizer)
    assert counter.count == 0
