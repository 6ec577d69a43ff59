"""`explain_sharding` says what `shard_model` does, before it does it."""

from __future__ import annotations

import gc
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from typer.testing import CliRunner

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, LlamaConfig, LlamaForCausalLM, ShardingError
from easydel.assets import embedded_model_path
from easydel.cli.app import app
from easydel.infra.construct import abstract_module
from easydel.paths import named_variables
from easydel.sharding import parse_mesh
from easydel.sharding.explain_picture import held_parts
from tests.models.table import FAMILIES
from tests.sharding.held import MESHES, family, held, mesh_named, one_of_a_kind, zeros

P = PartitionSpec
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ mesh axis\(es\) dropped")
ON = {name: [mesh for mesh in MESHES if mesh != "experts" or name == "mixtral"] for name in FAMILIES}
SIZES = {"vocab_size": 65, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
RULES = [("q_proj/kernel", P("tp")), ("kernel", P("fsdp")), ("k_proj", P("tp")), ("router", P()), (".*", P())]


def tiny(**fields):
    return abstract_module(LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=4, **fields))


@pytest.mark.parametrize("name", one_of_a_kind())
def test_every_device_holds_what_is_said(name):
    model = zeros(*family(name))
    assert len(ON[name]) == 7 + (name == "mixtral")
    for which in ON[name]:
        mesh = mesh_named(which)
        said = abstract_module(*family(name)).explain_sharding(mesh=mesh)
        model.shard_model(mesh=mesh)
        assert held(model) == said.bytes_per_device, which
        assert said.fullest_device[1] == max(held(model).values())
        for path, variable in named_variables(model).items():
            array = variable.get_value()
            assert array.sharding == NamedSharding(mesh, said[path].actual), (which, path)
            assert said[path].bytes == array.nbytes


def test_what_is_dropped_is_what_shard_model_warns_of():
    model = zeros(*family("llama"))
    mesh = mesh_named("five")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.shard_model(mesh=mesh)
    said = model.explain_sharding(mesh=mesh)
    assert f"{len(said.dropped)} mesh axis(es) dropped" in str(caught[0].message)
    assert str(said.dropped[0]) in str(caught[0].message)
    assert "is not divisible by fsdp=5" in said.dropped[0].reason


def test_a_mesh_need_not_exist():
    model = tiny()
    there = AbstractMesh((1, 4, 1, 2, 1), ("dp", "fsdp", "ep", "tp", "sp"), axis_types=(AxisType.Auto,) * 5)
    here = model.explain_sharding(mesh=mesh_named("tp"))
    for mesh in ({"fsdp": 2, "tp": 4}, (1, 2, 1, 4, 1), parse_mesh("tp=4, fsdp=2")):
        assert model.explain_sharding(mesh=mesh) == here
    assert model.explain_sharding(mesh=there) == model.explain_sharding(mesh={"tp": 2, "fsdp": 4})
    far = model.explain_sharding(mesh={"fsdp": 16, "tp": 48})
    assert len(far.bytes_per_device) == 768
    assert far["model/layers/0/mlp/up_proj/kernel"].bytes_per_device == 48 * 96 * 4 // 768


def test_the_mesh_in_use_is_the_default():
    model = zeros(*family("llama")).shard_model(mesh=mesh_named("tp"))
    assert model.explain_sharding() == model.explain_sharding(mesh=mesh_named("tp"))
    assert model.gather_model().explain_sharding().axes == tuple(mesh_named("tp").shape.items())


def test_rules_are_accounted_for():
    said = tiny().explain_sharding(RULES, {"fsdp": 2, "tp": 2})
    first, second, late, dead, rest = said.rules
    assert (first.chosen, first.matching, first.behind) == (2, 2, ())
    assert (second.chosen, second.matching, second.behind) == (13, 15, ((0, 2),))
    assert (late.chosen, late.matching, late.behind) == (0, 2, ((1, 2),))
    assert (rest.chosen, rest.matching) == (6, 21)
    assert said.shadowed_rules == (late,)
    assert said.dead_rules == (dead,)
    row = said["model/layers/1/self_attn/q_proj/kernel"]
    assert (row.rule, row.pattern, row.requested, row.actual) == (0, "q_proj/kernel", P("tp"), P("tp"))
    assert (row.shape, row.dtype, row.bytes, row.bytes_per_device) == ((48, 48), "float32", 9216, 4608)
    with pytest.raises(KeyError, match="nothing"):
        said["nothing"]


def test_other_state_takes_memory_too():
    class Odd(EasyDeLBaseModule):
        def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
            super().__init__(config, dtype, param_dtype, precision, rngs)
            self.up = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.table = jnp.arange(6.0)

    model = Odd(EasyDeLBaseConfig(), rngs=nnx.Rngs(0))
    said = model.explain_sharding(mesh=mesh_named("fsdp"))
    assert {row.path: row.bytes for row in said.state} == {
        "norm/mean": 32, "norm/var": 32, "drop/rngs/count": 4, "drop/rngs/key": 8, "table": 24,
    }  # fmt: skip
    assert held(model.shard_model(mesh=mesh_named("fsdp"))) == said.bytes_per_device
    assert len(model.table.devices()) == 8
    assert len(model.gather_model().table.devices()) == 1


def test_it_is_shown_in_words():
    text = str(tiny().explain_sharding(RULES, {"fsdp": 4, "tp": 5}))
    for words in (
        "mesh fsdp=4, tp=5: 20 devices",
        "on each device (the fullest: 0)",
        "model/layers/*/self_attn/q_proj/kernel",
        "48 × 48 float32",
        "[0] q_proj/kernel",
        "whole (asked: tp)",
        "shadowed by [1]: comes too late for all 2 it matches",
        "dead: matches no parameter",
        "2 more it matches are decided by [0]",
        "q_proj/kernel: dimension 0 of size 48 is not divisible by tp=5; tp dropped (× 2)",
    ):
        assert words in text, words
    table = tiny().explain_sharding(mesh={}).table()
    assert [str(column.header) for column in table.columns][:3] == ["parameter", "×", "shape"]


def test_it_is_a_dictionary_for_programs():
    said = tiny(attention_dropout=0.1).explain_sharding(mesh={"fsdp": 4, "tp": 5})
    content = json.loads(json.dumps(said.to_dict()))
    assert content["mesh"] == {"dp": 1, "fsdp": 4, "ep": 1, "tp": 5, "sp": 1}
    assert sum(row["bytes"] for row in content["parameters"] + content["state"]) == content["bytes"] == said.bytes
    assert content["bytes_per_device"]["19"] == content["fullest_device"]["bytes"] == said.fullest_device[1]
    (row,) = (row for row in content["parameters"] if row["path"] == "lm_head/kernel")
    assert (row["requested"], row["actual"]) == (["fsdp", "tp"], ["fsdp", "tp"])
    assert content["rules"][row["rule"]]["pattern"] == row["pattern"] == "lm_head/kernel"


@pytest.mark.parametrize("name", ["mixed", "tp", "six"])
def test_the_picture_knows_which_part_lies_where(name):
    mesh = mesh_named(name)
    for row in tiny().explain_sharding(mesh=mesh).parameters:
        places = NamedSharding(mesh, row.actual).devices_indices_map(row.shape)
        parts = [str(places[device]) for device in mesh.devices.flat]
        seen = held_parts(row, tuple(mesh.shape.items()))
        assert len(set(parts)) == len({*seen.tolist()}) == seen.max() + 1
        assert len({*zip(parts, seen.tolist(), strict=True)}) == len(set(parts)), row.path


def test_pictures_are_saved(tmp_path, monkeypatch):
    said = tiny().explain_sharding(mesh={"fsdp": 4, "tp": 2})
    said.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    said.save(str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text()
    assert page.count("<td") == 8 * 12
    assert "http" not in page
    assert "<script" not in page
    assert page.count('title="part 7 of 8"') == page.count('title="part 0 of 8"') > 0
    tiny().explain_sharding(mesh={"fsdp": 512}).save(tmp_path / "b.html")
    assert "the first 64 of them shown" in (tmp_path / "b.html").read_text()
    with pytest.raises(ValueError, match=r"a picture is a .png or .html file, got '.gif'"):
        said.save(tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"easydel-base\[plot\]"):
        said.save(tmp_path / "c.png")


def inspect(*options):
    return CliRunner().invoke(app, ["inspect", str(embedded_model_path()), *options])


def test_the_command_reads_no_weights(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("easydel.hub.safetensors.TensorEntry.read", refuse)
    gc.collect()
    before = len(jax.live_arrays())
    picture = tmp_path / "p.html"
    shown = inspect("--sharding", "--mesh", "fsdp=4,tp=2", "--picture", str(picture))
    assert shown.exit_code == 0, shown.output
    assert "8.3 MB in all, 1.0 MB on each device" in shown.output
    assert "model/layers/*/mlp/up_proj/kernel" in picture.read_text()
    content = json.loads(inspect("--sharding", "--mesh", "tp=2", "--json").output)
    assert {row["dtype"] for row in content["parameters"]} == {"bfloat16"}
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sharding",), "needs a mesh: --mesh fsdp=4,tp=2"),
        (("--mesh", "tp=2"), "go with --sharding"),
        (("--json",), "go with --sharding"),
        (("--sharding", "--mesh", "tp"), "expected axis=size pairs such as fsdp=4,tp=2, got 'tp'"),
        (("--sharding", "--mesh", "tp=two"), "got 'tp=two'"),
        (("--sharding", "--mesh", ""), "got ''"),
        (("--sharding", "--mesh", "tp=2,tp=4"), "the axis tp is given twice"),
        (("--sharding", "--mesh", "rows=2"), "no axis is called ['rows']; the axes are dp, fsdp, ep, tp, sp"),
        (("--sharding", "--mesh", "tp=-1"), "every size must be a positive integer"),
        (("--sharding", "--mesh", "tp=0"), "every size must be a positive integer"),
        (("--sharding", "--mesh", "tp=2", "--picture", "x.gif"), "a picture is a .png or .html file"),
    ],
)
def test_the_command_says_what_is_wrong(options, message):
    result = inspect(*options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_specs_with_several_axes_on_a_dimension():
    said = tiny().explain_sharding([(".*kernel", P(("fsdp", "tp"))), (".*", P())], {"fsdp": 16, "tp": 2})
    row = said["model/layers/0/self_attn/q_proj/kernel"]
    assert (row.actual, row.bytes_per_device) == (P("fsdp"), 9216 // 16)
    (drop,) = row.dropped
    assert drop.reason == "dimension 0 of size 48 is not divisible by tp=2 times the 16 parts it has"
    assert np.prod([size for _, size in said.axes]) == 32


def test_a_model_that_does_not_fit_is_refused_as_by_shard_model():
    model = zeros(*family("llama"))
    for rules in ([("kernel", P())], [(".*", P("rows"))]):
        with pytest.raises(ShardingError) as by_explaining:
            model.explain_sharding(rules)
        with pytest.raises(ShardingError) as by_sharding:
            model.shard_model(rules)
        assert str(by_explaining.value) == str(by_sharding.value)
