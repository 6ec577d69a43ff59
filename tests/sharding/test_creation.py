"""`lazy_init` takes no memory; `sharded_init` gives the numbers of one device on every mesh."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from easydel import (
    EasyDeLBaseConfig,
    EasyDeLBaseModule,
    LlamaConfig,
    LlamaForCausalLM,
    ShardingError,
    UnsupportedError,
)
from easydel.paths import flatten, named_variables
from easydel.sharding import create_arrays
from tests.models.table import FAMILIES
from tests.sharding.held import MESHES, bits, family, held, live, mesh_named, one_of_a_kind

P = PartitionSpec
pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ mesh axis\(es\) dropped")
# A family on one mesh, and a user's class on every mesh: the machinery is the same, compiling is what takes time.
TURNS = ("fsdp", "mixed", "tp", "dp", "five", "six")
ON = {name: "experts" if name == "mixtral" else TURNS[i % len(TURNS)] for i, name in enumerate(FAMILIES)}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 6)), jnp.int32)


def assert_equal(got, want):
    """Everything a module holds, bit by bit."""
    (graph, state), (other_graph, other_state) = nnx.split(got), nnx.split(want)
    flat, expected = flatten(state), flatten(other_state)
    assert flat.keys() == expected.keys()
    for path, leaf in expected.items():
        assert flat[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(bits(flat[path]), bits(leaf), err_msg=path)
    del graph, other_graph  # they differ in whether the model is sharded


class Custom(EasyDeLBaseModule):
    """Plain layers with what is rare: a sum in an initialiser, a plain array, statistics, streams, a module shared."""

    def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(32, 16, **kinds)
        self.up = nnx.Linear(16, 24, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        self.norm = nnx.BatchNorm(24, **kinds)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.general = nnx.LinearGeneral(24, (4, 8), **kinds)
        self.logs = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (16, 24))))
        self.gammas = nnx.Param(jax.random.gamma(rngs.params(), 2.0, (8, 8)))
        self.table = jnp.arange(6.0)
        self.tied = self.embed
        self.rngs = rngs.fork()

    def __call__(self, input_ids):
        return self.embed.attend(self.embed(input_ids))


CUSTOM_RULES = [("kernel|logs|gammas|embedding", P("fsdp", "tp")), (".*", P())]


@pytest.mark.parametrize("name", one_of_a_kind())
def test_the_numbers_are_those_of_one_device(name):
    cls, config = family(name)
    mesh = mesh_named(ON[name])
    keys, same_keys = nnx.Rngs(7), nnx.Rngs(7)
    model = cls.sharded_init(config, mesh, rngs=keys)
    assert_equal(model, cls(config, rngs=same_keys))
    assert_equal(keys, same_keys)
    said = model.explain_sharding()
    assert model.mesh == mesh
    assert held(model) == said.bytes_per_device
    for path, variable in named_variables(model).items():
        assert variable.get_value().sharding == NamedSharding(mesh, said[path].actual), path


@pytest.mark.parametrize(
    ("which", "streams"),
    [*((name, {}) for name in MESHES if name != "experts"), ("tp", {"params": 3, "dropout": 4})],
)
def test_a_user_class_too(which, streams):
    keys, same_keys = nnx.Rngs(1, **streams), nnx.Rngs(1, **streams)
    rules = CUSTOM_RULES
    model = Custom.sharded_init(EasyDeLBaseConfig(), mesh_named(which), rules, keys, param_dtype=jnp.bfloat16)
    assert_equal(model, Custom(EasyDeLBaseConfig(), param_dtype=jnp.bfloat16, rngs=same_keys))
    assert_equal(keys, same_keys)
    assert held(model) == model.explain_sharding(rules).bytes_per_device
    np.testing.assert_array_equal(bits(keys()), bits(same_keys()))  # they count on
    model.gather_model()


def llama(**fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaConfig(**sizes, num_attention_heads=4, **fields)


def test_the_defaults_are_those_of_the_config():
    model = LlamaForCausalLM.sharded_init(llama(sharding_axis_dims=(1, 2, 1, -1, 1)))
    assert dict(model.mesh.shape) == {"dp": 1, "fsdp": 2, "ep": 1, "tp": 4, "sp": 1}
    assert_equal(model, LlamaForCausalLM(llama(), rngs=nnx.Rngs(0)))
    assert flatten(model.params)["lm_head/kernel"].sharding.spec == P("fsdp", "tp")
    ids = IDS[:, :4]
    alone = LlamaForCausalLM(llama(), rngs=nnx.Rngs(0))
    got = jax.jit(model.pure_transform_fn())(model.params, {"input_ids": ids}).logits
    # Sums over devices are in another order
    np.testing.assert_allclose(
        got, jax.jit(alone.pure_transform_fn())(alone.params, {"input_ids": ids}).logits, atol=1e-5
    )


def test_dtypes_and_strictness_are_passed_on():
    mesh = mesh_named("tp")
    model = LlamaForCausalLM.sharded_init(llama(), mesh, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert model.module_dtype == model.dtype == jnp.bfloat16
    lazy = LlamaForCausalLM.lazy_init(llama(), mesh, param_dtype=jnp.float16)
    assert (lazy.module_dtype, lazy.dtype) == (jnp.float16, jnp.float32)
    for make in (LlamaForCausalLM.sharded_init, LlamaForCausalLM.lazy_init):
        with pytest.raises(ShardingError, match=r"(?s)strict sharding.*fsdp=5, asked for by rules\[\d\]"):
            make(llama(), mesh_named("five"), strict=True)


def test_a_lazy_model_takes_no_memory_and_knows_its_shardings():
    gc.collect()
    before = live()
    lazy = LlamaForCausalLM.lazy_init(llama(), mesh_named("tp"))
    assert live() == before
    real = LlamaForCausalLM.sharded_init(llama(), mesh_named("tp"))
    assert lazy.graphtree_params_shape == real.graphtree_params_shape
    assert lazy.explain_sharding() == real.explain_sharding()
    assert lazy.flops_per_token(1, 8) == real.flops_per_token(1, 8)
    assert lazy._get_partition_rules() == real._get_partition_rules()
    assert lazy.is_sharded
    far = LlamaForCausalLM.lazy_init(llama(), {"fsdp": 16, "tp": 2})
    assert flatten(far.graphtree_params_shape)["lm_head/kernel"].sharding.shard_shape((32, 64)) == (2, 32)
    assert far.explain_sharding().axes == (("dp", 1), ("fsdp", 16), ("ep", 1), ("tp", 2), ("sp", 1))


def test_a_lazy_model_can_be_planned_with():
    lazy = LlamaForCausalLM.lazy_init(llama(), {"fsdp": 16})
    outputs = jax.eval_shape(lazy.pure_transform_fn(), lazy.params, {"input_ids": IDS})
    assert outputs.logits.shape == (8, 6, 64)
    lazy.shard_model(mesh=mesh_named("tp"))
    compiled = jax.jit(lazy.pure_transform_fn()).lower(lazy.params, {"input_ids": IDS}).compile()
    assert compiled.memory_analysis().argument_size_in_bytes >= lazy.explain_sharding().fullest_device[1]
    assert lazy.half().module_dtype == jnp.float16
    assert flatten(lazy.gather_model().graphtree_params_shape)["lm_head/kernel"].sharding is None


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _: model(IDS),
        lambda model, _: model.model(input_ids=IDS),
        lambda model, _: model.generate(IDS, max_new_tokens=2),
        lambda model, _: next(model.stream(IDS, max_new_tokens=2)),
        lambda model, _: model.compute_loss(labels=IDS, input_ids=IDS),
        lambda model, path: model.save_pretrained(path),
        lambda model, _: model.to_torch(),
        lambda model, _: model.to_state(optax.sgd(0.1)),
        lambda model, _: model.resize_token_embeddings(80),
    ],
    ids=["call", "backbone", "generate", "stream", "loss", "save", "torch", "state", "resize"],
)
def test_what_needs_numbers_says_so(use, tmp_path):
    lazy = LlamaForCausalLM.lazy_init(llama(), mesh_named("tp"))
    with pytest.raises(UnsupportedError, match=r"not supported by a Llama\w+ of shapes only .*sharded_init\(config"):
        use(lazy, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_errors_of_real_models_stay_what_they_are():
    with pytest.raises(ValueError, match="integers"):
        LlamaForCausalLM(llama(), rngs=nnx.Rngs(0))(jnp.zeros((1, 2)))


def test_what_is_not_returned_is_not_made():
    def fail(_):
        raise AssertionError("this was computed")

    def make():
        jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), 1.0)
        used = jax.random.normal(jax.random.key(0), (8, 8))
        return [used + 1, used, jnp.zeros(3), 2 * used.sum()]

    split = NamedSharding(mesh_named("fsdp"), P("fsdp"))
    made = create_arrays(make, [split, split, None, None])
    used = jax.random.normal(jax.random.key(0), (8, 8))
    for got, want in zip(made, [used + 1, used, jnp.zeros(3), 2 * used.sum()], strict=True):
        np.testing.assert_array_equal(got, want)
    assert [x.sharding for x in made[:2]] == [split, split]
