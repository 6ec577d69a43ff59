"""The program around the commands: help, version, and errors that are one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import easydel
from easydel.cli.app import app

run = CliRunner().invoke


@pytest.mark.parametrize("command", ["chat", "demo", "generate", "inspect", "train"])
def test_each_command_explains_itself(command):
    result = run(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    assert run(app, ["--version"]).output.strip() == f"easydel {easydel.__version__}"


def test_help_says_what_holds_where_nothing_is_given():
    """Brackets are text there, not markup."""
    text = " ".join(run(app, ["chat", "--help"]).output.split())
    assert "Folder or Hub id [default: the embedded model]" in text


def test_module_is_the_same_program_and_its_help_loads_nothing_heavy():
    code = "import sys, runpy; sys.argv = ['easydel', '--help']\n"
    code += "try: runpy.run_module('easydel', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code, end.code\n"
    code += "print('heavy:', sorted({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout
    assert "heavy: []" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "{empty}"], "config.json"),
        (["generate", "--prompt", "x", "--model", "{empty}"], "config.json"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["generate", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["demo", "--text", "{short}", "--output", "{empty}/out"], "too few"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_1(arguments, said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    places = {"empty": tmp_path / "empty", "short": tmp_path / "short.txt"}
    result = run(app, [argument.format(**places) for argument in arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_traceback_on_request(tmp_path):
    result = run(app, ["--traceback", "inspect", str(tmp_path)])
    assert isinstance(result.exception, ValueError | OSError)


@pytest.mark.parametrize(
    "arguments", [["generate"], ["demo", "--steps", "0"], ["demo", "--text", "no-such-file"], ["x"]]
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert run(app, arguments).exit_code == 2
