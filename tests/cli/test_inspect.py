"""`easydel inspect` and the tables."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from typer.testing import CliRunner

from easydel.assets import embedded_model_path
from easydel.cli.app import app
from easydel.cli.inspect import by_parameter, read_tensors
from easydel.cli.tables import bytes_text, count_text, group_parameters, spec_text


def test_the_embedded_model_is_described_without_reading_weights(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("easydel.hub.safetensors.TensorEntry.read", refuse)
    result = CliRunner().invoke(app, ["inspect", str(embedded_model_path())], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for words in ("llama", "model/layers/*/self_attn/q_proj/kernel", "bfloat16", "224 × 224", "4.15 M", "8.3 MB"):
        assert words in result.output
    assert "lm_head" not in result.output  # it is tied


def test_tensors_that_are_not_ours_are_shown_too(embedded):
    config = embedded[0].config
    tensors = read_tensors(str(embedded_model_path()))
    tensors["extra.weight"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    arrays, specs = by_parameter(config, tensors)
    assert len(arrays) == len(tensors)
    assert "extra.weight" in arrays
    assert "extra.weight" not in specs


def test_headers_agree_with_the_loaded_model(embedded):
    model = embedded[0]
    arrays, specs = by_parameter(model.config, read_tensors(str(embedded_model_path())))
    groups = group_parameters(arrays, specs)
    loaded = group_parameters(model.params, model._specs_sharding())
    assert {(g.pattern, g.shape, g.spec, g.count) for g in groups} == {
        (g.pattern, g.shape, g.spec, g.count) for g in loaded
    }
    assert {g.dtype for g in groups} == {"bfloat16"}


def test_an_unknown_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "frob"}))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "frob" in result.stderr
    assert "not supported" in result.stderr


def test_groups_count_layers_and_keep_different_shapes_apart():
    half = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    tree = {"layers": {"0": {"w": half}, "1": {"w": half}, "2": {"w": jax.ShapeDtypeStruct((5,), jnp.float32)}}}
    groups = group_parameters({"m": tree}, {"m": {"layers": {"0": {"w": PartitionSpec("tp")}}}})
    assert [(g.pattern, g.count, g.size, g.bytes) for g in groups] == [
        ("m/layers/*/w", 1, 6, 12),
        ("m/layers/*/w", 1, 6, 12),
        ("m/layers/*/w", 1, 5, 20),
    ]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (PartitionSpec(), "whole"),
        (PartitionSpec(None, None), "whole"),
        (PartitionSpec("tp", None), "tp, ·"),
        (PartitionSpec(("dp", "fsdp"), "tp"), "dp+fsdp, tp"),
        (None, "whole"),
    ],
)
def test_specs_in_words(spec, text):
    assert spec_text(spec) == text


def test_numbers_have_units():
    assert [count_text(n) for n in (7, 1500, 4_146_016, 7e9)] == ["7", "1.5 k", "4.15 M", "7 G"]
    assert [bytes_text(n) for n in (12, 2048, 8_292_032, 16e9)] == ["12 B", "2.0 kB", "8.3 MB", "16.0 GB"]
