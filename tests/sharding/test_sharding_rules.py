"""Rules, specs and meshes: what matches, what fits, and what each error says."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from easydel import EasyDeLBaseConfig, ShardingError
from easydel.sharding import create_mesh, fit_spec, infer_rules, match_rules, named_shardings, spread_spec
from easydel.sharding.mesh import resolve_axis_dims

P = PartitionSpec
SHAPES = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in {"a/kernel": (8, 6), "a/bias": (6,), "s": ()}.items()
}


@pytest.fixture(scope="module")
def mesh():
    return create_mesh((1, 4, 1, 2, 1))


def test_the_first_rule_that_matches_wins_and_scalars_need_none():
    rules = [("kernel", P("fsdp", "tp")), ("a/.*", P("tp")), ("bias", P("fsdp"))]
    assert match_rules(rules, SHAPES) == {"a/kernel": P("fsdp", "tp"), "a/bias": P("tp"), "s": P()}


def test_patterns_are_searched_not_matched():
    assert match_rules([("kernel$", P("tp")), ("^a/b", P())], SHAPES)["a/kernel"] == P("tp")
    with pytest.raises(ShardingError, match="a/kernel"):
        match_rules([("^kernel", P("tp")), ("bias", P())], SHAPES)


BAD_RULES = {
    "no_match": ([("kernel", P())], r"a/bias \(6,\): no rule matches; add one"),
    "too_long": (
        [("bias", P("fsdp", "tp")), (".*", P())],
        r"(?s)a/bias \(6,\): rules\[0\] \('bias', .* is longer than .* 1 dim.*shorten the spec",
    ),
    "regex": ([("a/(kernel", P())], r"'a/\(kernel'.*not a regular expression"),
    "no_pair": (["kernel"], "expected a .regex, PartitionSpec. pair"),
    "no_spec": ([("kernel", ("fsdp", None))], "expected a PartitionSpec, got tuple"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_rules_that_cannot_be_used_are_named(name):
    rules, message = BAD_RULES[name]
    with pytest.raises(ShardingError, match=message):
        match_rules(rules, SHAPES)


def test_all_parameters_without_a_rule_are_listed():
    with pytest.raises(ShardingError, match=r"(?s)a/kernel.*a/bias"):
        match_rules([("nothing", P())], SHAPES)


@pytest.mark.parametrize(
    ("spec", "shape", "fitted"),
    [
        (P("fsdp", "tp"), (8, 6), P("fsdp", "tp")),
        (P("tp", "fsdp"), (8, 6), P("tp", None)),
        (P(("fsdp", "tp")), (8, 6), P(("fsdp", "tp"))),
        (P(("fsdp", "tp")), (4, 6), P("fsdp")),
        (P(("fsdp", "tp")), (6, 6), P("tp")),
        (P(None, "dp"), (3, 5), P(None, "dp")),
        (P("fsdp"), (0,), P("fsdp")),
        (P(), (), P()),
    ],
    ids=str,
)
def test_axes_that_do_not_divide_are_dropped(mesh, spec, shape, fitted):
    assert fit_spec(spec, shape, mesh) == fitted


def test_one_warning_summarises_everything_dropped(mesh):
    shapes = {f"layers/{i}/kernel": jax.ShapeDtypeStruct((7, 9), np.float32) for i in range(8)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = named_shardings(dict.fromkeys(shapes, P("fsdp", "tp")), shapes, mesh)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "16 mesh axis(es) dropped" in message
    assert "layers/0/kernel: dimension 0 of size 7 is not divisible by fsdp=4; fsdp dropped" in message
    assert {*made.values()} == {NamedSharding(mesh, P(None, None))}


def test_strict_raises_instead_and_names_them_all(mesh):
    specs = {"a/kernel": P("tp", "fsdp"), "a/bias": P("fsdp"), "s": P()}
    with pytest.raises(ShardingError, match=r"(?s)a/kernel: dimension 1 of size 6.*a/bias: dimension 0"):
        named_shardings(specs, SHAPES, mesh, strict=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("rows"), r"p: .* names \['rows'\], but the mesh has axes \('dp', 'fsdp', 'ep', 'tp', 'sp'\)"),
        (P("tp", "tp"), "uses a mesh axis twice"),
        (P(None, None, "tp"), r"longer than the shape \(8, 6\)"),
    ],
)
def test_specs_a_mesh_cannot_take_raise(mesh, spec, message):
    with pytest.raises(ShardingError, match=message):
        fit_spec(spec, (8, 6), mesh, path="p")


@pytest.mark.parametrize(
    ("dims", "resolved"),
    [
        ((1, -1, 1, 1, 1), (1, 8, 1, 1, 1)),
        ((2, 1, 1, -1, 1), (2, 1, 1, 4, 1)),
        ((2, 2, 1, 2, -1), (2, 2, 1, 2, 1)),
        ((8, 1, 1, 1, 1), (8, 1, 1, 1, 1)),
    ],
)
def test_minus_one_is_inferred(dims, resolved):
    assert tuple(create_mesh(dims).shape.values()) == resolved
    config_mesh = EasyDeLBaseConfig(sharding_axis_dims=dims).mesh
    assert tuple(config_mesh.shape.items()) == tuple(zip(("dp", "fsdp", "ep", "tp", "sp"), resolved, strict=True))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 3, 1, 1, 1), r"fsdp=3.* needs 3 devices, but 8 are here"),
        ((3, -1, 1, 1, 1), "needs a multiple of 3 devices, but 8"),
        ((1, 4, 1, 1, 1), "needs 4 devices"),
        ((-1, -1, 1, 1, 1), "at most one may be -1"),
        ((1, 0, 1, 1, -1), "every size must be positive"),
        ((1, -2, 1, 1, 1), "every size must be positive"),
        ((1, 8, 1), "3 mesh dimensions .* for 5 axes"),
    ],
)
def test_wrong_mesh_sizes_say_what_is_there(dims, message):
    with pytest.raises(ShardingError, match=message):
        resolve_axis_dims(dims, 8)
    with pytest.raises(ShardingError, match=message):
        _ = EasyDeLBaseConfig(sharding_axis_dims=dims).mesh


def test_meshes_are_automatic_built_once_and_freely_named():
    config = EasyDeLBaseConfig(sharding_axis_dims=(2, -1), sharding_axis_names=("data", "model"))
    assert dict(config.mesh.shape) == {"data": 2, "model": 4}
    assert set(config.mesh.axis_types) == {AxisType.Auto}
    assert config.mesh is EasyDeLBaseConfig(sharding_axis_dims=[2, -1], sharding_axis_names=["data", "model"]).mesh
    with pytest.raises(ShardingError, match="must differ"):
        create_mesh((2, 4), ("x", "x"))
    assert [*create_mesh((1, 2, 1, 1, 1), devices=jax.devices()[4:6]).devices.flat] == jax.devices()[4:6]


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 16), P(None, "*")),
        ((16, 8), P("*")),
        ((24, 7), P("*")),
        ((100, 8), P(None, "*")),
        ((7, 9), None),
        ((), None),
        ((0, 3), None),
    ],
)
def test_full_sharding_takes_the_largest_divisible_dimension(mesh, shape, spec):
    everything = tuple(mesh.axis_names)
    expected = None if spec is None else P(*(everything if entry == "*" else entry for entry in spec))
    assert spread_spec(shape, mesh) == expected


def test_rules_are_inferred_from_plain_layers():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(8, 4, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs)])
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)

    net = Net(nnx.Rngs(0))
    shapes = {
        "embed/embedding": (8, 4),
        "blocks/0/kernel": (4, 4),
        "blocks/0/bias": (4,),
        "norm/scale": (4,),
        "conv/kernel": (3, 4, 4),
    }
    made = match_rules(infer_rules(net), {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()})
    assert [*made.values()] == [P("tp", "fsdp"), P("fsdp", "tp"), P(), P(), P(None, "fsdp", "tp")]
