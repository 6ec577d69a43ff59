"""`easydel verify`: what is equal is called equal, and what is broken on one side only is named."""

from __future__ import annotations

import json
import shutil
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import easydel
from easydel.cli.app import app
from easydel.paths import named_variables
from easydel.verification import matching, recording, reference
from tests.models.pairs import build_hf, write
from tests.models.table import FAMILIES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a tiny random checkpoint of a family, once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            entry = FAMILIES[family]
            write(build_hf(entry, entry.main_task, {**entry.config, **entry.main.config}), made[family])
        return made[family]

    return make


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def broken(monkeypatch, path, change):
    """Change one of our variables between loading and running."""
    original = recording.run_recorded

    def run_recorded(model, inputs):
        variable = named_variables(model)[path]
        variable.set_value(change(variable.get_value()))
        return original(model, inputs)

    monkeypatch.setattr(recording, "run_recorded", run_recorded)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        (
            "llama",
            ["embeddings", "model.layers.0", "model.layers.1", "model.norm", "logits"],
        ),
        pytest.param(
            "mixtral", ["embeddings", "model.layers.0", "model.layers.1", "model.norm", "logits"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "bert", ["embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "logits"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gpt2", ["embeddings", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "logits"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mamba2", ["embeddings", "backbone.layers.0", "backbone.layers.1", "backbone.norm_f", "logits"],
            marks=pytest.mark.slow,
        ),
        (
            "t5",
            [
                "encoder: embeddings", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm",
                "decoder: embeddings", "decoder.block.0", "decoder.block.1", "decoder.final_layer_norm",
                "logits", "encoder_last_hidden_state",
            ],
        ),
    ],
)  # fmt: skip
def test_what_is_equal_is_called_equal(checkpoint, family, parts):
    found = easydel.verify(checkpoint(family))
    assert found.equal, str(found)
    assert [part.name for part in found.parts] == parts
    assert 0 < found.largest_error < 1e-5  # float32 over two layers; exactly 0 would be one model compared with itself
    assert (found.batch, found.length, found.inside) == (2, 16, ())


@pytest.mark.parametrize(
    ("family", "path", "name"),
    [
        pytest.param(
            "qwen3", "model/layers/1/self_attn/q_norm/scale", "model.layers.1.self_attn.q_norm", marks=pytest.mark.slow
        ),
        ("mixtral", "model/layers/1/mlp/experts/up_proj/kernel", "model.layers.1.mlp.experts"),
        pytest.param(
            "bert", "bert/embed_positions/embedding", "bert.embeddings.position_embeddings", marks=pytest.mark.slow
        ),
        ("gpt2", "transformer/layers/1/self_attn/k_proj/kernel", "transformer.h.1.attn"),
        pytest.param("mamba2", "backbone/layers/1/mixer/A_log", "backbone.layers.1.mixer", marks=pytest.mark.slow),
        pytest.param(
            "t5",
            "model/decoder/layers/1/cross_attn/v_proj/kernel",
            "decoder.block.1.layer.1.EncDecAttention.v",
            marks=pytest.mark.slow,
        ),
        # The first layer holds the table of all layers' positions, which is no module of the layer here.
        ("t5", "model/encoder/relative_attention_bias/embedding", "encoder.block.0.layer.0.SelfAttention"),
        pytest.param("llama", "model/norm/scale", "model.norm", marks=pytest.mark.slow),
        ("llama", "lm_head/kernel", "lm_head"),
    ],
)
def test_the_module_whose_weights_are_wrong_is_named(checkpoint, monkeypatch, family, path, name):
    broken(monkeypatch, path, lambda array: array * 1.5)
    found = easydel.verify(checkpoint(family))
    assert not found.equal
    assert found.first.name == name, str(found)
    assert found.first.input_error < 1e-5
    differing = [part.agrees for part in found.parts].index(False)
    assert all(part.agrees for part in found.parts[:differing])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rms_norm_eps": 0.5}, "model.layers.0.input_layernorm"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "model.layers.0.self_attn"),
        ({"hidden_act": "gelu"}, "model.layers.0.mlp"),
    ],
)
def test_a_field_that_one_side_reads_otherwise_is_found_by_the_module_that_uses_it(
    checkpoint, monkeypatch, tmp_path, fields, name
):
    other = shutil.copytree(checkpoint("llama"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | fields))
    original = reference.load_reference
    monkeypatch.setattr(reference, "load_reference", lambda cls, _, dtype: original(cls, other, dtype))
    found = easydel.verify(checkpoint("llama"))
    assert found.first.name == name, str(found)


def test_the_command_prints_a_table_and_the_verdict(checkpoint):
    result = run(checkpoint("llama"), "--seed", "3")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "LlamaForCausalLM in float32, 2 × 16 tokens"
    assert lines[-1].startswith("equal: largest relative error ")
    assert lines[-1].endswith(" (allowed 0.0001)")
    assert sum(line.endswith("  equal") for line in lines) == 5
    assert result.stderr == ""


def test_the_command_names_what_differs(checkpoint, monkeypatch):
    broken(monkeypatch, "model/layers/1/mlp/up_proj/kernel", lambda array: array * 1.5)
    result = run(checkpoint("llama"))
    assert result.exit_code == 1
    *table, verdict = result.stdout.splitlines()
    assert verdict.startswith("differs first at model.layers.1.mlp.up_proj: relative error ")
    verdicts = {line.split()[0]: line.split()[-1] for line in table if line}
    assert verdicts["model.layers.0"] == verdicts["model.layers.1.mlp.gate_proj"] == "equal"
    assert verdicts["model.layers.1"] == verdicts["model.layers.1.mlp.up_proj"] == verdicts["logits"] == "differs"
    assert run(checkpoint("llama"), "--tolerance", "100").exit_code == 0


def test_numbers_that_are_not_finite_differ_even_if_both_sides_have_them(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = run(folder, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["first"]["name"] == "model.layers.1.mlp.down_proj"
    assert (found["first"]["error"], found["first"]["note"], found["equal"]) == (None, "not finite", False)
    assert found["verdict"] == "differs first at model.layers.1.mlp.down_proj: not finite"


def test_one_model_is_in_memory_at_a_time(checkpoint, monkeypatch):
    ours, alive = [], []
    run_recorded, load_reference = recording.run_recorded, reference.load_reference

    def running(model, inputs):
        ours.extend(weakref.ref(x) for x in (model, *jax.tree.leaves(model.params)))
        return run_recorded(model, inputs)

    def loading(*arguments):
        alive.extend(ref() is not None for ref in ours)
        return load_reference(*arguments)

    monkeypatch.setattr(recording, "run_recorded", running)
    monkeypatch.setattr(reference, "load_reference", loading)
    assert easydel.verify(checkpoint("llama")).equal
    assert alive == [False] * 22  # the model and its 21 parameters


def test_a_layer_without_a_counterpart_is_no_agreement(checkpoint, monkeypatch):
    match = matching.match_modules
    without = lambda *held: {path: name for path, name in match(*held).items() if not path.endswith("layers/1")}  # noqa: E731
    monkeypatch.setattr(matching, "match_modules", without)
    result = run(checkpoint("llama"))
    assert result.exit_code == 1
    assert "do not both have model/layers/1" in result.stderr


def test_bfloat16_has_a_tolerance_of_its_own(checkpoint):
    found = easydel.verify(checkpoint("llama"), dtype="bfloat16")
    assert found.equal
    assert 1e-3 < found.largest_error < found.tolerance == 5e-2  # one rounding is 2e-3


def test_a_text_is_compared_with_the_checkpoints_tokenizer(shorter_folder):
    result = run(shorter_folder, "--text", "def read(path):", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["batch"] == 1
    assert 2 < found["length"] < 16
    assert found["equal"] is True


def test_without_torch_it_says_how_to_install_it(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(checkpoint("llama"))
    assert result.exit_code == 1
    assert "pip install torch" in result.stderr


def test_a_file_without_a_tensor_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = run(folder)
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj.weight" in result.stderr


def test_another_head_than_the_checkpoints_is_refused_on_either_side(checkpoint):
    result = run(checkpoint("llama"), "--task", "sequence-classification")
    assert result.exit_code == 1
    assert "score" in result.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "frob"}, ("frob", "not supported")),
        ({"model_type": "bert", "architectures": ["BertForPreTraining"]}, ("BertForPreTraining", "masked-lm")),
        ({"model_type": "bert", "architectures": ["BertForEmbedding"]}, ("transformers", "BertForEmbedding")),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, ("quantized",)),
    ],
)
def test_what_cannot_be_compared_gets_one_line(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "int8"], ["--task", "frob"], ["--length", "0"], ["--text", "a", "--seed", "1"], ["--tolerance", "-1"]],
)
def test_bad_usage_has_its_own_exit_code(checkpoint, arguments):
    assert run(checkpoint("llama"), *arguments).exit_code == 2


def test_more_tokens_than_positions_are_refused(checkpoint):
    result = run(checkpoint("gpt2"), "--length", "1000")
    assert result.exit_code == 1
    assert "positions" in result.stderr


class Two(nnx.Module):
    """A linear layer inside another module, and one that is never reached."""

    def __init__(self):
        self.first, self.second = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x, fails):
        x = self.first(x)
        if fails:
            raise RuntimeError("on purpose")
        return self.second(x)


def test_calls_are_recorded_until_the_end_of_the_block_whatever_happens():
    model, other, before = Two(), Two(), (Two.__call__, nnx.Linear.__call__)
    x = jnp.ones((1, 2))
    with pytest.raises(RuntimeError, match="on purpose"), recording.recorded(model) as calls:
        model(other(x, fails=False), fails=True)
    assert (Two.__call__, nnx.Linear.__call__) == before
    assert list(calls) == ["first"]  # and nothing of the other model
    np.testing.assert_array_equal(calls["first"].given, other(x, fails=False))
    np.testing.assert_array_equal(calls["first"].made[0], model.first(other(x, fails=False)))
    with recording.recorded(model) as calls:
        jax.jit(lambda x: model(x, fails=False))(x)
    assert calls == {}  # traced, not run
