"""`easydel demo`, shortened."""

from __future__ import annotations

import importlib.util
import re

import pytest
from typer.testing import CliRunner

from easydel import LlamaForCausalLM
from easydel.cli import demo
from easydel.cli.app import app


@pytest.fixture(scope="module")
def shown(tmp_path_factory, shorter_folder):
    folder = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--steps", "6", "--tokens", "6", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "embedded_model_path", lambda: shorter_folder)
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_every_section_is_there(shown):
    titles = ("1  Load", "2  Generate", "3  Fine-tune", "4  Save and reload", "5  Generate again")
    places = [shown[1].index(title) for title in titles]
    assert places == sorted(places)
    assert "bit for bit" in shown[1]
    assert "model/layers/*/mlp/up_proj/kernel" in shown[1]


def test_it_learns_the_text(shown):
    line = next(line for line in shown[1].splitlines() if "richard-iii.txt, held out" in line)
    before, after = map(float, re.findall(r"(?:before|after)\s+([\d.]+)", line))
    assert after < 0.9 * before


def test_it_leaves_a_model_and_a_picture(shown):
    folder = shown[0]
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "tokenizer.json").exists()
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 4096


def test_without_matplotlib_no_picture_but_a_hint(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert demo.draw([], tmp_path / "loss.png", "title") == demo.PLOT_MISSING
    assert not (tmp_path / "loss.png").exists()
    assert "easydel-base[plot]" in demo.PLOT_MISSING
