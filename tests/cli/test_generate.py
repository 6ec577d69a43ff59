"""`easydel generate`."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from easydel.cli.app import app
from easydel.cli.text import stream_text

PROMPT = "def read(path):\n"


def generate(*options: str) -> str:
    result = CliRunner().invoke(app, ["generate", "--prompt", PROMPT, "--max-new-tokens", "12", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_greedy_text_is_what_the_library_generates(shorter, shorter_folder):
    model, tokenizer = shorter
    input_ids = np.array([tokenizer.encode(PROMPT)])
    expected = model.generate(input_ids=input_ids, max_new_tokens=12, do_sample=False).sequences[0]
    shown = generate("--temperature", "0", "--model", str(shorter_folder))
    assert shown == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_the_seed_decides_the_sample():
    """Of the embedded model, which is the default."""
    one, again, other = (generate("--seed", seed, "--temperature", "2", "--top-p", "1") for seed in ("1", "1", "2"))
    assert one == again
    assert one != other


class Scripted:
    """A model whose answer is known: it makes the given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def stream(self, input_ids, **options):
        for token in self.tokens:
            yield np.array([token], np.int32)


@pytest.mark.parametrize("text", ["plain words", "é ↔ 数 🙂", "ends in half a character"])
def test_pieces_join_to_the_text_and_never_split_a_character(text, embedded):
    tokenizer = embedded[1]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if text.startswith("ends"):
        tokens, text = [*tokens, tokenizer.encode("é", add_special_tokens=False)[0]], text + "\ufffd"
    pieces = list(stream_text(Scripted(tokens), tokenizer, "x"))
    assert "".join(pieces) == text
    assert len(pieces) == len(tokens) + 1
    assert not any("\ufffd" in piece for piece in pieces[:-1])
