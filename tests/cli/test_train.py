"""`easydel train`: one command that checks, trains and goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from easydel.assets import embedded_text_path
from easydel.cli.app import app
from easydel.cli.train import read_setting
from easydel.training import Trainer
from easydel.training.logs import read_log
from tests.compiled import compiled_once

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.yaml"
FRESH = {
    "model_type": "llama", "tokenizer": "stdlib-4m",
    "config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 4096,
    },
}  # fmt: skip


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def config(tmp_path):
    """A file of a tiny run, with sections replaced."""

    def write(**sections):
        (tmp_path / "a.txt").write_text("x = 1\n" * 200)
        data = {"train": {"path": str(tmp_path / "a.txt"), "sequence_length": 16}}
        run = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "save_steps": 2}
        content = {"model": FRESH, "data": data, "training": run, "logging": {"steps": 1, "to": ["console", "jsonl"]}}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(content | sections))
        return file

    return write


def test_trains_and_goes_on(config, tmp_path):
    file = config()
    first = train(file, "--set", "training.max_steps=2", "--set", "schedule.name=constant")
    assert first.exit_code == 0, first.output
    assert "trainable parameters: " in first.stderr
    assert "mesh: dp=1, fsdp=8" in first.stderr
    assert "step 2/2  loss" in first.stderr
    assert "max_steps: 2 steps, 256 tokens" in first.stderr
    second = train(file, "--set", "schedule.name=constant")
    assert "going on from step 2" in second.stderr
    assert "max_steps: 4 steps, 512 tokens" in second.stderr
    assert [record["step"] for record in read_log(tmp_path / "out" / "log.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_check_loads_everything_and_writes_nothing(config, tmp_path):
    result = train(config(), "--check")
    assert result.exit_code == 0, result.output
    assert "steps: 4" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_ends_the_run(config, tmp_path, monkeypatch, number, code):
    write = Trainer._write

    def send(self, record):
        if record["step"] == 1:
            os.kill(os.getpid(), number)
        return write(self, record)

    monkeypatch.setattr(Trainer, "_write", send)
    result = train(config())
    assert result.exit_code == code, result.output
    assert f"stopped by {number.name} at step 1; the same command goes on from there" in result.stderr
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("sections", "settings", "said"),
    [
        ({}, ["training.max_steps=many"], "training.max_steps: expected int or null, got 'many'"),
        ({}, ["max_steps"], "--set 'max_steps': expected SECTION.NAME=VALUE"),
        ({}, ["training.max_steps=[1"], "--set training.max_steps:1: not YAML"),
        ({}, ["data.train.path=nowhere/*.txt"], "nowhere/*.txt"),
        ({}, ["mesh.tp=3"], "needs 3 devices, but 8 are here"),
        ({}, ["training.frozen=nothing_like_it"], "nothing_like_it"),
        # What a trainer refuses is tests/training's matter; one case shows that this command tells it.
        pytest.param({}, ["training.eval_steps=2"], "eval_steps: there are no evaluation data", marks=pytest.mark.slow),
        ({"data": {"train": {"path": "{folder}/bad.jsonl"}}}, [], "bad.jsonl:1"),
    ],
)
def test_what_a_user_can_mend_is_told_without_a_traceback(config, tmp_path, sections, settings, said):
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    file = config(**sections)
    file.write_text(file.read_text().replace("{folder}", str(tmp_path)))
    result = train(file, *(part for setting in settings for part in ("--set", setting)))
    assert result.exit_code == 1, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_settings_are_yaml():
    assert read_setting("a.b=1e-4") == ("a.b", 1e-4)
    assert read_setting("a=[x, y]") == ("a", ["x", "y"])
    assert read_setting("a=x=y") == ("a", "x=y")
    assert read_setting("a=") == ("a", None)


@pytest.mark.slow
def test_the_example_learns(tmp_path):
    """As it stands, but for the folder and a text that does not change with the documents."""
    out = tmp_path / "out"
    result = train(EXAMPLE, "--set", f"training.output_dir={out}", "--set", f"data.train.path={embedded_text_path()}")
    assert result.exit_code == 0, result.output
    losses = [record["loss"] for record in read_log(out / "log.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    assert {file.name for file in out.iterdir()} == {"checkpoints", "log.jsonl", "curves.png", "tensorboard", "model"}
