"""`easydel lora`."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from typer.testing import CliRunner

from easydel import AutoEasyDeLModelForCausalLM, LoraConfig
from easydel.cli.app import app
from easydel.paths import flatten


def run(*arguments):
    return CliRunner().invoke(app, ["lora", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def adapters(shorter, tmp_path_factory):
    """Two folders with adapters of a model, and the model with both, `one` active."""
    model = nnx.clone(shorter[0])
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(name, LoraConfig(rank=2 + seed, alpha=4, pattern="(q|v)_proj"))
        model.set_adapter(name)
        lora = model.split_lora_params()[1]
        noise = np.random.default_rng(seed)
        flat = {path: np.float32(noise.standard_normal(x.shape) * 0.1) for path, x in flatten(lora).items()}
        from easydel.paths import nest

        model.merge_lora_params(nest(flat)).save_adapter(folder / name)
    model.set_adapter("one")
    return folder, model


@pytest.fixture(scope="module")
def base(shorter_folder):
    return str(shorter_folder)


def logits(model):
    prompt = jnp.arange(8, dtype=jnp.int32)[None] + 5
    return np.asarray(jax.jit(model.pure_transform_fn())(model.params, {"input_ids": prompt}).logits)


def test_merging_gives_a_model_that_computes_the_same(adapters, base, tmp_path):
    folder, model = adapters
    result = run("merge", base, folder / "one", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out") in result.output
    merged = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.module_dtype == jnp.float32
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    model.set_adapter("one")
    want = logits(model)
    # Folded in float32 and not: what rounding leaves.
    np.testing.assert_allclose(logits(merged), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_several_are_added_by_weight(adapters, base, tmp_path):
    folder, model = adapters
    also = f"{folder / 'two'}=-0.5"
    result = run("merge", base, folder / "one", tmp_path, "--weight", 0.7, "--also", also, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    model.add_weighted_adapter(["one", "two"], [0.7, -0.5], "sum", combination_type="cat").set_adapter("sum")
    want = logits(model)
    model.set_adapter("one").delete_adapter("sum")
    merged = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(merged), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_base_s_type_is_kept(adapters, base, tmp_path):
    folder, _ = adapters
    assert run("merge", base, folder / "one", tmp_path / "out").exit_code == 0
    assert AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path / "out").module_dtype == jnp.bfloat16


def test_an_adapter_is_described_without_reading_weights(adapters, base, monkeypatch):
    folder, model = adapters

    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("easydel.hub.safetensors.TensorEntry.read", refuse)
    result = run("info", folder / "one")
    assert result.exit_code == 0, result.output
    for words in ("rank", "q_proj, v_proj", "model.layers.*.self_attn.q_proj", "lora_A 2 × ", "CAUSAL_LM", base):
        assert words in result.output, words
    found = json.loads(run("info", folder / "one", "--json").output)
    model.set_adapter("one")
    sizes = [x.size for x in flatten(model.split_lora_params()[1]).values()]
    assert found["parameters"] == sum(sizes)
    assert found["bytes"] == 4 * sum(sizes)
    assert (found["rank"], found["alpha"], found["scale"]) == (2, 4, 2)
    assert [group["count"] for group in found["layers"]] == [model.config.num_hidden_layers] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "{base}", "{one}", "{out}", "--dtype", "int3"], "float32, bfloat16, float16"),
        (["merge", "{base}", "{one}", "{out}", "--also", "two"], "expected an adapter and its weight"),
        (["merge", "{base}", "{one}", "{one}"], "choose another folder to write into"),
        (["merge", "{base}", "{empty}", "{out}"], "no adapter: expected adapter_config.json"),
        (["merge", "{empty}", "{one}", "{out}"], "config.json"),
        (["info", "{empty}"], "no adapter"),
        (["info", "{broken}"], "peft_type='IA3' is not supported"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_1(arguments, said, adapters, base, tmp_path):
    folder, _ = adapters
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "one", tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "adapter_config.json").read_text())
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    places = {
        "base": base,
        "one": folder / "one",
        "out": tmp_path / "out",
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken",
    }
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["merge"], ["info"]])
def test_each_command_explains_itself(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
