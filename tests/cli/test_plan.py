"""`easydel plan`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from easydel.cli.app import app

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config.json and nothing else."""
    path = tmp_path_factory.mktemp("planned")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_config_alone_is_planned(folder):
    result = run(folder, "--mesh", "fsdp=16,tp=2", "--memory", "80GB")
    assert result.exit_code == 0, result.output
    for words in ("fsdp=16, tp=2", "batch 16 × 16", "gradients", "dots_no_batch", "fits into 80GB"):
        assert words in result.output


def test_json_holds_all_of_it(folder):
    result = run(folder, "--mesh", "fsdp=2", "--memory", "1KB", "--remat", "full", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["parameters"] == 2 * 256 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32
    assert found["fits"] is False
    assert found["remat"] == "full"
    held = found["bytes_per_device"]
    assert set(held) == {"parameters", "gradients", "optimizer", "inputs", "activations", "cache", "total"}
    assert found["collective_bytes_per_step"]["all_gather"]["fsdp"] > 0


@pytest.mark.slow  # docs/planning.md looks for one, and tests/planning does in Python
def test_a_mesh_is_looked_for(folder):
    result = run(folder, "--devices", "4", "--memory", "1GB", "--remat", "none", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["fits"] is True
    assert found["suggestions"][0]["axes"] == found["axes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--mesh fsdp=64,tp=8"),
        (["--devices", "4"], "--memory 80GB"),
        (["--mesh", "fsdp=2", "--devices", "4"], "--mesh fsdp=64,tp=8"),
        (["--mesh", "fsdp=2", "--batch-size", "3"], "batch_size=3"),
        (["--mesh", "fsdp=2", "--dtype", "int8"], "dtype='int8'"),
    ],
)
def test_bad_questions_get_one_line(folder, arguments, words):
    result = run(folder, *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
