"""Logs: lines that other readers take, events that TensorBoard's format gives back, a bar in a terminal, curves."""

from __future__ import annotations

import io
import json
import math
import struct

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from easydel import TrainingArguments
from easydel.training.logs import ConsoleLog, JsonLog, Logs, TensorBoardLog, choose, draw_curves, read_log
from easydel.training.logs.choose import LOGS, chosen_logs

RECORD = {
    "step": 10, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6, "mfu": 0.347,
    "memory_bytes": 3 * 2**30, "skipped_steps": 0,
}  # fmt: skip


def strict(line):
    """Read a line as JSON allows it: without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(line, parse_constant=refuse)


class TestJson:
    def test_lines_are_written_at_once_and_read_back(self, tmp_path):
        log = JsonLog(tmp_path / "deep" / "log.jsonl")
        log.start(0, 100)
        log.write(RECORD)
        log.write({"step": 11, "loss": math.nan, "grad_norm": math.inf})
        lines = log.file.read_text().splitlines()  # not closed yet
        assert [strict(line)["step"] for line in lines] == [10, 11]
        first, second = read_log(log.file)
        assert first == RECORD
        assert (math.isnan(second["loss"]), second["grad_norm"]) == (True, math.inf)
        log.close()

    def test_resuming_drops_what_is_done_again_and_what_was_cut_off(self, tmp_path):
        file = tmp_path / "log.jsonl"
        before = [{"step": n, "loss": 1.0 / n if n < 3 else math.inf} for n in range(1, 7)]
        log = JsonLog(file)
        log.start(0, None)
        for record in before:
            log.write(record)
        log.close()
        with file.open("a") as opened:
            opened.write('{"step": 7, "lo')
        assert read_log(file) == before
        log.start(4, None)
        log.write({"step": 5, "loss": 9.0})
        log.close()
        assert read_log(file) == [*before[:4], {"step": 5, "loss": 9.0}]
        assert [strict(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]
        log.start(0, None)  # from the beginning: nothing is true any more
        log.close()
        assert read_log(file) == []

    def test_a_damaged_line_is_named(self, tmp_path):
        file = tmp_path / "log.jsonl"
        file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"log\.jsonl:2: not a line of a log"):
            read_log(file)


def events(directory):
    """(tag, step, value) of event files, read by the format alone: framed records, protocol buffers' wire types."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = [], []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                purged.append(event.step)
    return found, purged


def test_tensorboard_events(tmp_path):
    log = TensorBoardLog(tmp_path)
    log.start(9, None)
    log.write(RECORD)
    log.write({"step": 10, "eval_loss": 3.5, "eval_perplexity": math.exp(3.5)})
    log.close()
    found, purged = events(tmp_path)
    assert ("train/loss", 10, 2.5) in found
    assert ("eval/loss", 10, 3.5) in found
    assert {tag for tag, _, _ in found} == {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/mfu",
        "train/memory_bytes", "train/skipped_steps", "eval/loss", "eval/perplexity",
    }  # fmt: skip
    assert purged == [10]  # what an earlier part of the run wrote of step 10 and later is not shown


def terminal(width):
    return Console(force_terminal=True, file=io.StringIO(), width=width, color_system=None)


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_shows_loss_speed_and_memory(width):
    console = terminal(width)
    log = ConsoleLog(console)
    log.start(0, 40)
    log.advance(10)
    log.write(RECORD)
    log.write({"step": 10, "eval_loss": 3.25, "eval_perplexity": 25.79, "eval_accuracy": 0.5})
    log.say("a [b]message[/b]")
    log.close()
    text = console.file.getvalue()
    for part in ("10/40", "loss 2.5000", "lr 1.00e-03", "12,346 tok/s", "MFU 34.7%", "3.2 GB"):
        assert part in text, part
    assert "step 10  eval loss 3.2500  perplexity 25.79  accuracy 50.0%" in text
    assert "a [b]message[/b]" in text
    assert ("━" in text) is (width == 120)
    assert "skipped" not in text


@pytest.mark.parametrize(("total", "shown"), [(40, "step 10/40  loss 2.5000"), (None, "step 10  loss 2.5000")])
def test_without_a_terminal_there_are_lines(total, shown):
    console = Console(file=io.StringIO(), width=40)
    log = ConsoleLog(console)
    log.start(0, total)
    log.write(RECORD | {"skipped_steps": 2})
    log.say("ended")
    log.close()
    first, second = console.file.getvalue().splitlines()  # however narrow, a record is a line
    assert first.startswith(shown)
    assert first.endswith("2 skipped")
    assert second == "ended"


def test_curves_show_what_there_is(tmp_path):
    records = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3} for n in range(1, 9)]
    evaluations = [{"step": n, "eval_loss": 4.0 / n} for n in (4, 8)]
    gaps = [{"step": 9, "loss": math.nan}, {"step": 10, "loss": math.inf}]
    pictures = {}
    for name, drawn in (
        ("plain", records),
        ("both", records + evaluations),
        ("gaps", records + gaps),
        ("none", [{"step": 1}]),
    ):
        draw_curves(drawn, tmp_path / "new" / f"{name}.png", "A run")
        pictures[name] = matplotlib.image.imread(tmp_path / "new" / f"{name}.png")
    shapes = {picture.shape for picture in pictures.values()}
    assert shapes == {(720, 960, 4)}
    assert np.abs(pictures["plain"] - pictures["both"]).max() > 0.5  # the evaluation's curve
    assert np.abs(pictures["plain"] - pictures["none"]).max() > 0.5


class TestChoice:
    @staticmethod
    def chosen(folder, log_to=None):
        return [type(log).__name__ for log in chosen_logs(TrainingArguments(str(folder), log_to=log_to), folder)]

    def test_all_by_default_and_those_that_are_named(self, tmp_path):
        assert self.chosen(tmp_path) == ["ConsoleLog", "JsonLog", "TensorBoardLog", "CurvesLog"]
        assert self.chosen(tmp_path, ()) == []
        assert self.chosen(tmp_path, ("jsonl",)) == ["JsonLog"]
        assert self.chosen(tmp_path, ("png",)) == ["JsonLog", "CurvesLog"]  # drawn from the lines

    @pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("png", "matplotlib")])
    def test_a_missing_package(self, tmp_path, monkeypatch, name, package):
        monkeypatch.setattr(choose, "find_spec", lambda asked: None if asked == package else object())
        assert len(self.chosen(tmp_path)) == len(LOGS) - 1  # left out by default
        with pytest.raises(ImportError, match=rf"'{name}' needs {package}: pip install 'easydel-base\[train\]'"):
            self.chosen(tmp_path, (name,))

    def test_only_the_first_process_keeps_logs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(choose.jax, "process_index", lambda: 1)
        assert self.chosen(tmp_path) == []


def test_several_logs_are_told_the_same():
    class Heard:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *given: self.calls.append((name, *given))

    heard = [Heard(), Heard()]
    logs = Logs(heard)
    logs.start(1, 2)
    logs.advance(2)
    logs.write(RECORD)
    logs.say("x")
    logs.close()
    calls = [("start", 1, 2), ("advance", 2), ("write", RECORD), ("say", "x"), ("close",)]
    assert [each.calls for each in heard] == [calls, calls]
