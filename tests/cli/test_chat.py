"""`easydel chat`: turns, history, commands, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from easydel.assets import embedded_model_path
from easydel.cli.app import app
from easydel.cli.chat import Chat, room_of, sampling_of
from easydel.cli.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
GREEDY = ("--greedy", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture(scope="module")
def with_template(tmp_path_factory, shorter_folder):
    """The same model in a folder of its own, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for file in shorter_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(said: str, *arguments: str):
    return CliRunner().invoke(app, ["chat", *arguments], input=said)


def answer_of(shorter, text: str, *, special: bool, new: int = 8) -> str:
    """What `generate` itself makes of a text."""
    model, tokenizer = shorter
    ids = np.array([tokenizer.encode(text, add_special_tokens=special)])
    made = np.asarray(model.generate(ids, max_new_tokens=new, do_sample=False).sequences)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_without_a_template_the_text_so_far_goes_on(shorter, shorter_folder):
    done = chat("def read(path):\n\nimport os\n", str(shorter_folder), *GREEDY, "--system", "# a module")
    assert done.exit_code == 0, done.output
    start = "# a module\ndef read(path):"
    first = answer_of(shorter, start, special=True)
    second = answer_of(shorter, f"{start}{first}\nimport os", special=True)
    assert done.stdout == f"{first}\n{second}\n"
    assert done.stderr.count("no chat template") == 1


def test_with_a_template_the_turns_are_what_it_makes_of_them(shorter, with_template, tmp_path):
    done = chat(
        f"one\n//two\n/save {tmp_path}/talk.json\n/exit\nnot read\n", str(with_template), *GREEDY, "--system", "s"
    )
    assert done.exit_code == 0, done.output
    start = "<|begin|>system\ns<|end|><|begin|>user\none<|end|><|begin|>assistant\n"
    first = answer_of(shorter, start, special=False)
    again = f"{start}{first}<|end|><|begin|>user\n/two<|end|><|begin|>assistant\n"
    second = answer_of(shorter, again, special=False)
    assert done.stdout == f"{first}\n{second}\n"
    assert "no chat template" not in done.stderr
    roles = ("system", "user", "assistant", "user", "assistant")
    contents = ("s", "one", first, "/two", second)
    saved = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    assert json.loads((tmp_path / "talk.json").read_text()) == saved


def test_clear_forgets_and_the_seed_decides(shorter_folder):
    hot = (str(shorter_folder), "--temperature", "1.5", "--top-p", "1", "--max-new-tokens", "12")
    one, again, other = (chat("x = \nx = \n", *hot, "--seed", seed).stdout for seed in ("1", "1", "7"))
    assert one == again != other
    first, second = (chat("/clear\n" * n + "x = \n/clear\nx = \n", str(shorter_folder), *GREEDY).stdout for n in (0, 1))
    assert first == second
    half = len(first) // 2
    assert first[:half] == first[half:], "after /clear the same message gets the same greedy answer"


@pytest.mark.parametrize(
    ("said", "arguments", "message"),
    [
        ("/what\n", GREEDY, "/what"),
        ("/save\n", GREEDY, "/save"),
        ("/save {there}\n", GREEDY, "exists"),
        ("/save {there}/no/x.json\n", GREEDY, "x.json"),
        ("word " * 600 + "\n", GREEDY, "there is room for 504"),
        ("x\n", ("--greedy", "--temperature", "1"), "--temperature"),
        ("x\n", ("--temperature", "0", "--top-p", "0.5"), "--top-p"),
        ("x\n", ("--max-new-tokens", "512"), "512 positions"),
        ("x\n", ("--quantization", "int3"), "int3"),
        ("x\n", ("--top-p", "2"), "top_p"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1_without_a_terminal(said, arguments, message, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    done = chat(said.format(there=tmp_path / "there.json"), *arguments)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "there.json").read_text() == "mine"


def test_quantized(shorter_folder):
    done = chat("def f(x):\n", str(shorter_folder), *GREEDY, "--quantization", "8bit", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_long_conversations_lose_their_oldest_turns_but_not_the_system_message(tokenizer):
    talk = Conversation(tokenizer, "# sys", room=60)
    first, left_out = talk.ask("a" * 20)
    assert tokenizer.decode(first[0], skip_special_tokens=True) == "# sys\n" + "a" * 20
    assert left_out == 0
    lost = 0
    for number in range(12):
        talk.answer(f"answer{number}")
        ids, left_out = talk.ask(f"question{number} = [1, 2, 3]")
        lost += left_out
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert ids.shape[1] <= 60
        assert text.startswith("# sys\n")
        assert text.endswith(f"question{number} = [1, 2, 3]")
        assert f"answer{number}" in text or left_out
    assert lost >= 16
    assert lost % 2 == 0
    assert len(talk.messages) == 25, "what is saved is the whole"
    with pytest.raises(ValueError, match="shorten"):
        talk.ask("word " * 100)
    assert len(talk.messages) == 25


def test_a_template_that_takes_no_system_message_says_so(tokenizer):
    strict = AutoTokenizer.from_pretrained(embedded_model_path())
    strict.chat_template = NO_SYSTEM
    Conversation(strict)
    with pytest.raises(ValueError, match="system, user: no system message"):
        Conversation(strict, "s")


def test_the_checkpoints_sampling_comes_before_this_commands():
    stored = SimpleNamespace(do_sample=True)
    assert sampling_of(stored, None, None) == {"do_sample": True}
    assert sampling_of(stored, 0.3, None) == {"do_sample": True, "temperature": 0.3}
    assert sampling_of(None, None, 0.5) == {"do_sample": True, "temperature": 0.7, "top_p": 0.5}


def test_room_is_what_the_answer_leaves():
    rotary = SimpleNamespace(longest_sequence=None, config=SimpleNamespace(max_position_embeddings=100))
    assert room_of(rotary, 30) == 70
    endless = SimpleNamespace(longest_sequence=None, config=SimpleNamespace())
    assert room_of(endless, 30) is None


class Terminal:
    """Standard input of a terminal: lines, and keys that interrupt."""

    def __init__(self, *given):
        self.given = list(given)

    def isatty(self):
        return True

    def readline(self, *_):
        if not self.given:
            return ""
        line = self.given.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line + "\n"


class Counting:
    """A model that writes the numbers' tokens, and may be interrupted at some of them."""

    def __init__(self, tokenizer, interrupts=()):
        self.tokens = [tokenizer.encode(f" {n}", add_special_tokens=False) for n in range(10)]
        self.interrupts, self.prompts, self.closed = interrupts, [], 0

    def stream(self, input_ids, **options):
        self.prompts.append(np.asarray(input_ids))
        try:
            for number, tokens in enumerate(self.tokens):
                for _ in range(list(self.interrupts).count(number)):
                    signal.raise_signal(signal.SIGINT)
                for token in tokens:
                    yield np.array([token], np.int32)
        finally:
            self.closed += 1


@pytest.fixture
def at_terminal(monkeypatch, tokenizer):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored

    def start(network, *given):
        monkeypatch.setattr(sys, "stdin", Terminal(*given))
        return Chat(network, tokenizer, Conversation(tokenizer), {}, 0)

    yield start
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_answer_and_not_the_chat(at_terminal, tokenizer, capsys):
    network, before = Counting(tokenizer, [4]), signal.getsignal(signal.SIGINT)
    talk = at_terminal(network, "count", "on")
    talk.run()
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [" 0 1 2 3", " 0 1 2 3"]
    assert err.count("stopped") == 2, "a line in between: the second one does not end the chat"
    assert network.closed == 2
    assert [m["content"] for m in talk.conversation.messages] == ["count", " 0 1 2 3", "on", " 0 1 2 3"]
    assert tokenizer.decode(network.prompts[1][0], skip_special_tokens=True) == "count 0 1 2 3\non"


def test_an_answer_stopped_before_it_began_takes_the_message_back(at_terminal, tokenizer):
    talk = at_terminal(Counting(tokenizer, [0]), "count")
    talk.run()
    assert talk.conversation.messages == []


@pytest.mark.parametrize(
    ("given", "interrupts"),
    [
        ((KeyboardInterrupt, KeyboardInterrupt, "not read"), []),
        (("count", KeyboardInterrupt, "not read"), [2]),
        (("count", "not read"), [2, 2]),
    ],
    ids=["at the prompt", "after an answer", "in an answer"],
)
def test_twice_ends_the_chat(at_terminal, tokenizer, given, interrupts):
    talk = at_terminal(Counting(tokenizer, interrupts), *given)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk.run()
    assert sys.stdin.given == ["not read"]
    assert signal.getsignal(signal.SIGINT) is before


def test_once_at_the_prompt_is_forgiven_and_errors_are_too(at_terminal, tokenizer, capsys):
    network = Counting(tokenizer)
    at_terminal(network, KeyboardInterrupt, "/what", KeyboardInterrupt, "/help", "count").run()
    out, err = capsys.readouterr()
    assert " 0 1 2 3 4 5 6 7 8 9\n" in out
    assert err.count("Ctrl-C again") == 2
    assert "error: there is no command '/what'" in err
    assert "/save FILE" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_real_terminal(tmp_path):
    """The program itself, behind a pseudo-terminal: prompt, an answer that Ctrl-C stops, Ctrl-D."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "easydel", "chat", "--max-new-tokens", "400", "--temperature", "2", "--top-p", "1"]
    root = Path(__file__).parents[2]
    program = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, cwd=root, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    seen = b""

    def wait(text: bytes, seconds: float = 120) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert select.select([leader], [], [], max(end - time.monotonic(), 0))[0], seen
            seen += os.read(leader, 1024)
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait(b"> ")
        os.write(leader, b"def f(x):\n")
        wait(b"def f(x):")
        while len(seen) < 40:  # the answer is under way
            seen += os.read(leader, 1024)
        os.write(leader, b"\x03")
        wait(b"stopped")
        wait(b"> ")
        os.write(leader, b"/help\n")
        wait(b"/clear")
        wait(b"> ")
        os.write(leader, b"\x04")
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(leader)
