"""What is wrong with rules and meshes is said the same by every call that takes them: parameter, rule, cure."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, ShardingError
from easydel.paths import flatten
from easydel.sharding import create_mesh

P = PartitionSpec


class Net(EasyDeLBaseModule):
    config_class = EasyDeLBaseConfig

    def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


@pytest.fixture(scope="module")
def mesh():
    return create_mesh((1, 4, 1, 2, 1))


@pytest.fixture(scope="module")
def model():
    return Net(EasyDeLBaseConfig(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("net")
    model.save_pretrained(path)
    return path


WITH_RULES = {
    "shard_model": lambda model, rules, mesh, _: model.shard_model(rules, mesh),
    "explain_sharding": lambda model, rules, mesh, _: model.explain_sharding(rules, mesh),
    "_named_shardings": lambda model, rules, mesh, _: model._named_shardings(rules, mesh),
    "_shard_fns": lambda model, rules, mesh, _: model._shard_fns(rules, mesh),
    "_gather_fns": lambda model, rules, mesh, _: model._gather_fns(rules, mesh),
    "_apply_sharding_fns": lambda model, rules, mesh, _: model._apply_sharding_fns(model.params, rules, mesh),
    "lazy_init": lambda model, rules, mesh, _: Net.lazy_init(model.config, mesh, rules),
    "sharded_init": lambda model, rules, mesh, _: Net.sharded_init(model.config, mesh, rules),
    "from_pretrained": lambda _, rules, mesh, folder: Net.from_pretrained(folder, partition_rules=rules, mesh=mesh),
}

RULES = {
    "regex": ([(".*", P()), ("up/(kernel", P())], f"rules[1] ('up/(kernel', {P()}): not a regular expression"),
    "no_pair": (["kernel"], "rules[0] 'kernel': expected a (regex, PartitionSpec) pair"),
    "no_spec": ([(".*", ("fsdp",))], "rules[0] ('.*', ('fsdp',)): expected a PartitionSpec, got tuple; write"),
    "no_rules": ("kernel", "expected (regex, PartitionSpec) pairs, got str"),
    "no_match": ([("kernel", P())], "up/bias (6,): no rule matches; add one, or end the rules with ('.*', P())"),
    "too_long": (
        [("kernel", P()), ("bias", P(None, "tp")), (".*", P())],
        f"up/bias (6,): rules[1] ('bias', {P(None, 'tp')}) is longer than the parameter's 1 dimension(s); shorten the",
    ),
    "unknown_axis": (
        [("kernel", P("rows")), (".*", P())],
        f"up/kernel: rules[0] ('kernel', {P('rows')}) names ['rows'], but the mesh has axes "
        "('dp', 'fsdp', 'ep', 'tp', 'sp'); change the rule",
    ),
    "twice": (
        [("kernel", P("tp", "tp")), (".*", P())],
        f"up/kernel: rules[0] ('kernel', {P('tp', 'tp')}) uses a mesh axis twice; an axis can split one dimension only",
    ),
}


@pytest.mark.parametrize("call", WITH_RULES)
@pytest.mark.parametrize("wrong", RULES)
def test_rules_that_cannot_be_used(call, wrong, model, mesh, folder):
    rules, message = RULES[wrong]
    before = {path: leaf.sharding for path, leaf in flatten(model.params).items()}
    with pytest.raises(ShardingError, match=re.escape(message)):
        WITH_RULES[call](model, rules, mesh, folder)
    assert {path: leaf.sharding for path, leaf in flatten(model.params).items()} == before


def test_every_parameter_concerned_is_listed(model, mesh):
    with pytest.raises(ShardingError, match=r"(?s)norm/bias: rules\[0\].*norm/scale: .*up/bias: .*up/kernel: "):
        model.shard_model([(".*", P("rows"))], mesh)


NO_DEVICES = {
    "shard_model": lambda model, mesh, _: model.shard_model(mesh=mesh),
    "fully_shard": lambda model, mesh, _: model.fully_shard(mesh),
    "fully_gather": lambda model, mesh, _: model.fully_gather(mesh),
    "sharded_init": lambda model, mesh, _: Net.sharded_init(model.config, mesh),
    "from_pretrained": lambda _, mesh, folder: Net.from_pretrained(folder, mesh=mesh),
}


WRONG = {"dict": {"fsdp": 8}, "dims": (1, 8, 1, 1, 1), "abstract": AbstractMesh((4, 2), ("fsdp", "tp"))}


@pytest.mark.parametrize("call", NO_DEVICES)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:.*(have no dimension divisible|mesh axis.*dropped)")
def test_arrays_need_a_mesh_of_devices(call, wrong, model, folder):
    message = r"expected a jax.sharding.Mesh of devices, got \w+; make one with .*create_mesh"
    with pytest.raises(ShardingError, match=message):
        NO_DEVICES[call](model, WRONG[wrong], folder)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize("call", ["explain_sharding", "lazy_init"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 2}, "mesh {'rows': 2}: no axis is called ['rows']; the axes are dp, fsdp, ep, tp, sp"),
        ({"tp": 0}, "tp=0, sp=1): every size must be a positive integer"),
        ({"tp": 2.0}, "every size must be a positive integer"),
        ({"tp": True}, "every size must be a positive integer"),
        ((1, -1, 1, 1, 1), "-1 is inferred only for devices that are here"),
        ((1, 8, 1), "3 mesh dimensions (1, 8, 1) for 5 axes"),
        ("fsdp=4", "expected a jax.sharding.Mesh or AbstractMesh, a mapping such as {'fsdp': 4, 'tp': 2}"),
        (4, "or one size per axis of ('dp', 'fsdp', 'ep', 'tp', 'sp'), got int"),
    ],
)
def test_meshes_that_need_not_exist_must_make_sense(call, wrong, message, model):
    with pytest.raises(ShardingError, match=re.escape(message)):
        WITH_RULES[call](model, None, wrong, None)


@pytest.mark.parametrize("call", ["shard_model", "explain_sharding", "lazy_init", "sharded_init"])
def test_wrong_sizes_in_the_config_say_what_is_there(call):
    config = EasyDeLBaseConfig(sharding_axis_dims=(1, 3, 1, 1, 1))
    with pytest.raises(ShardingError, match=r"fsdp=3.* needs 3 devices, but 8 are here; change sharding_axis_dims"):
        WITH_RULES[call](Net(config, rngs=nnx.Rngs(0)), None, None, None)


def test_axes_of_one_s_own_names():
    config = EasyDeLBaseConfig(sharding_axis_dims=(2, -1), sharding_axis_names=("data", "model"))
    model = Net(config, rngs=nnx.Rngs(0))
    rules = [("kernel", P("model", "data")), (".*", P())]
    assert model.explain_sharding(rules, {"data": 2, "model": 4}) == model.explain_sharding(rules)
    with pytest.raises(ShardingError, match=r"no axis is called \['tp'\]; the axes are data, model"):
        model.explain_sharding(rules, {"tp": 2})


@pytest.mark.parametrize("strict", [False, True])
def test_loading_strictly(strict, folder):
    rules, odd = [("kernel", P("tp", "fsdp")), (".*", P())], create_mesh((1, 4, 1, 2, 1))
    if strict:
        message = (
            r"(?s)strict sharding.*leave strict out.*up/kernel: dimension 1 of size 6 is not divisible by fsdp=4, "
            r"asked for by rules\[0\] \('kernel', "
        )
        with pytest.raises(ShardingError, match=message):
            Net.from_pretrained(folder, partition_rules=rules, mesh=odd, strict=True)
    else:
        with pytest.warns(UserWarning, match=r"1 mesh axis\(es\) dropped"):
            loaded = Net.from_pretrained(folder, partition_rules=rules, mesh=odd)
        assert loaded.up.kernel.get_value().sharding.spec == P("tp", None)
