"""`easydel chat`: turn by turn with a model on the terminal."""

from __future__ import annotations

import signal
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import typer

from easydel.assets import embedded_model_path
from easydel.cli.conversation import Conversation
from easydel.cli.text import load_model, load_tokenizer, stream_pieces
from easydel.training.interrupts import Interrupts

TEMPERATURE, TOP_P = 0.7, 0.95  # where neither the command nor the checkpoint says anything
HELP = """\
/clear      forget the conversation, but not the system message
/save FILE  write the conversation as JSON
/help       show this
/exit       end, as Ctrl-D does
//…         a message that begins with /
Ctrl-C stops an answer; twice, it ends the chat."""


def run_chat(
    *,
    model: str | None,
    system: str | None,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int,
    seed: int,
    greedy: bool,
    dtype: str,
    quantization: str | None,
) -> None:
    """Read messages from standard input and write answers to standard output; all else goes to standard error."""
    if greedy and temperature is not None:
        raise ValueError("--greedy takes the likeliest token each time: leave out --temperature")
    greedy = greedy or temperature == 0
    if greedy and top_p is not None:
        raise ValueError("without drawing (--greedy, or --temperature 0) there is no --top-p: leave it out")
    source = model or str(embedded_model_path())
    network, tokenizer = load_model(source, dtype, quantization), load_tokenizer(source)
    options = {"do_sample": False} if greedy else sampling_of(network.generation_config, temperature, top_p)
    conversation = Conversation(tokenizer, system, room_of(network, max_new_tokens))
    Chat(network, tokenizer, conversation, options | {"max_new_tokens": max_new_tokens}, seed).run()


def sampling_of(stored: Any, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Return the options of sampling: those given, else the checkpoint's if it samples, else this command's."""
    given = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    own = {} if getattr(stored, "do_sample", None) else {"temperature": TEMPERATURE, "top_p": TOP_P}
    return {"do_sample": True} | own | given


def room_of(network: Any, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have, so that its answer still has positions; `None`: any number."""
    longest = network.longest_sequence or getattr(network.config, "max_position_embeddings", None)
    if longest is not None and max_new_tokens >= longest:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a message: there are {longest} positions"
        )
    return None if longest is None else longest - max_new_tokens


class Chat:
    """A chat on standard input and output.

    Args:
        network: a causal language model.
        tokenizer: its tokenizer.
        conversation: so far.
        options: of `generate`.
        seed: of the first answer; the next one's is one more, and so on.
    """

    def __init__(
        self, network: Any, tokenizer: Any, conversation: Conversation, options: dict[str, Any], seed: int
    ) -> None:
        self.network, self.tokenizer, self.conversation = network, tokenizer, conversation
        self.options, self.seed = options, seed
        self.is_terminal = sys.stdin.isatty()
        self._interrupted = False
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Go on until the input ends, or the user says so.

        Raises:
            KeyboardInterrupt: Ctrl-C twice, with no message in between.
            ValueError: something is wrong with a message that does not come from a terminal.
            OSError: likewise.
        """
        if not self.conversation.has_template:
            say("this model has no chat template: it goes on from the text so far, your lines included")
        if self.is_terminal:
            say("/help shows the commands, Ctrl-D ends the chat")
            with suppress(ImportError):  # not on every platform; it gives input() editing and a history
                import readline  # noqa: F401
        while True:
            try:
                line = self._read()
                self._interrupted = False
                if line is None or not self._take(line):
                    return
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True
                say("\nCtrl-C again ends the chat")
            except (ValueError, OSError) as error:
                if not self.is_terminal:
                    raise
                say(f"error: {error}")

    def _read(self) -> str | None:
        """Return the next line, or `None` at the end of the input."""
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input("> " if sys.stdout.isatty() else "")
        except EOFError:
            sys.stdout.write("\n")
            return None

    def _take(self, line: str) -> bool:
        """Do what a line says; return whether to go on."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[1:] if line.startswith("//") else line)
            return True
        name, _, rest = line.strip().partition(" ")
        if name == "/save":
            self._save(rest.strip())
        elif name not in ("/help", "/clear", "/exit") or rest:
            raise ValueError(f"there is no command {line.strip()!r}; /help shows them (a message may begin with //)")
        elif name == "/help":
            say(HELP)
        elif name == "/clear":
            self.conversation.clear()
        return name != "/exit"

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        path = Path(name).expanduser()
        if path.exists() and path not in self._saved:
            raise ValueError(f"{path} exists already: choose another name")
        self.conversation.save(path)
        self._saved.add(path)
        say(f"saved {len(self.conversation.messages)} messages to {path}")

    def _answer(self, message: str) -> None:
        ids, left_out = self.conversation.ask(message)
        if left_out:
            say(
                f"the conversation is longer than the model can read: {left_out} old messages are left out from here on"
            )
        said: list[str] = []
        try:
            with Interrupts((signal.SIGINT,)) as interrupts:
                pieces = stream_pieces(self.network, self.tokenizer, ids, **self.options, seed=self.seed)
                with closing(pieces):
                    for piece in pieces:
                        if interrupts.received:
                            break
                        said.append(piece)
                        sys.stdout.write(piece)
                        sys.stdout.flush()
        except KeyboardInterrupt:  # the second one
            self._interrupted = True
            raise
        finally:
            self.seed += 1
            self.conversation.answer("".join(said))
            sys.stdout.write("\n")
            sys.stdout.flush()
        if interrupts.received:
            self._interrupted = True
            say("stopped; Ctrl-C again ends the chat")


def say(text: str) -> None:
    """Tell the user what is no answer."""
    typer.echo(text, err=True)
