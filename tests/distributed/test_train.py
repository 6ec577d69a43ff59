"""`easydel train` in several processes: the run of a single one, resumed, with one process that speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easydel.training.logs import read_log
from tests.distributed.launch import run
from tests.distributed.models import opened_for_writing, shown

# A rate at which training is stable: at 0.5 the loss rises again, and a rounding of 1e-7 grows to 1e-4 in five steps.
FILE = """
model:
  model_type: llama
  tokenizer: stdlib-4m
  config: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 4096,
            num_key_value_heads: 2}}
data: {{sequence_length: 32, text_separator: "\\n\\n", seed: 3, train: {{path: {text}}}, eval: {{path: {held_out}}}}}
optimizer: {{name: sgd, learning_rate: 0.2}}
schedule: {{name: constant}}
training: {{output_dir: {out}, max_steps: 20, batch_size: 8, save_steps: 4, eval_steps: 10}}
logging: {{steps: 1, to: [console, jsonl, tensorboard, png]}}
{more}
"""
SPLIT = "mesh: {dp: 2, fsdp: 2, tp: 2, dcn: {fsdp: 2}}"
"""A process has rows that do not stand together: 0, 1, 4 and 5, or the others."""
ACROSS = "mesh: {dp: 2, fsdp: 2, tp: 2, dcn: {tp: 2}}"
"""Each process has half of each tensor, and needs all rows."""


def text_file(folder: Path, name: str, count: int, seed: int) -> Path:
    """Write documents of words that follow each other, of all lengths."""
    random = np.random.default_rng(seed)
    words = np.array(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
    texts = [" ".join(words[(np.arange(random.integers(3, 40)) + random.integers(10)) % 10]) for _ in range(count)]
    file = folder / name
    file.write_text("\n\n".join(texts))
    return file


def described(folder: Path, out: str, more: str = "") -> Path:
    """Write the YAML file of a run."""
    text, held_out = text_file(folder, "text.txt", 300, 0), text_file(folder, "held_out.txt", 20, 1)
    file = folder / f"{out}.yaml"
    file.write_text(FILE.format(text=text, held_out=held_out, out=folder / out, more=more))
    return file


def trained(file: str, out: str, *steps: int) -> dict[str, Any]:
    """Train up to each of these steps, one after the other; return what was shown and which files were opened."""
    from easydel.cli.train import run_train

    names = opened_for_writing(Path(out))
    with shown() as text:
        codes = [run_train(Path(file), [f"training.max_steps={count}"], check=False) for count in steps]
    return {"codes": codes, "shown": text.getvalue(), "files": sorted(set(names))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    trained(str(described(folder, "alone")), str(folder / "alone"), 20)
    return folder / "alone"


@pytest.mark.parametrize(
    ("processes", "devices", "more"),
    [
        (2, 4, SPLIT),
        pytest.param(4, 2, "", marks=pytest.mark.slow),
        pytest.param(2, 4, ACROSS, marks=pytest.mark.slow),
    ],
)
def test_a_run(alone: Path, processes: int, devices: int, more: str, tmp_path: Path) -> None:
    file, out = described(tmp_path, "out", more), tmp_path / "out"
    found = run(trained, processes, devices, str(file), str(out), 8, 20)
    assert all(one["codes"] == [0, 0] for one in found)
    # The same rows and tokens at each step, whoever made them; sums over devices are taken in another order.
    ours, theirs = read_log(out / "log.jsonl"), read_log(alone / "log.jsonl")
    numbers = {"loss", "eval_loss", "tokens", "num_tokens", "learning_rate", "eval_tokens"}
    at_the_stop = [record for record in ours if record["step"] == 8 and "eval_loss" in record]
    assert len(at_the_stop) == 1  # the first command's end
    ours.remove(at_the_stop[0])
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & numbers:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
    check_one_speaks(found, out)
    ids = np.arange(12)[None]
    logits = [np.asarray(load(folder / "model")(ids).logits) for folder in (out, alone)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def load(folder: Path) -> Any:
    import easydel

    return easydel.LlamaForCausalLM.from_pretrained(folder)


def check_one_speaks(found: list[dict[str, Any]], out: Path) -> None:
    """Only process 0 shows anything and writes logs, configs, the tokenizer."""
    assert "step 20/20" in found[0]["shown"]
    assert "going on from step 8" in found[0]["shown"]
    assert {"log.jsonl", "curves.png"} <= {name.partition("/")[0] for name in found[0]["files"]}
    for other in found[1:]:
        assert other["shown"] == ""
        assert all(name.startswith("checkpoints/") for name in other["files"]), other["files"]
    assert (out / "model" / "tokenizer.json").exists()
