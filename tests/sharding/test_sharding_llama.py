"""A Llama on eight devices computes what it computes on one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, LlamaConfig, LlamaForCausalLM
from easydel.paths import flatten
from easydel.sharding import create_mesh

MESHES = {
    "fsdp": (1, 8, 1, 1, 1),
    "tp": (1, 1, 1, 8, 1),
    "fsdp_tp": (1, 4, 1, 2, 1),
    "all": (2, 1, 1, 2, 2),
}
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)), jnp.int32)
PROMPT = np.asarray(IDS[:2, :5])
SGD = optax.sgd(0.1)


@jax.jit
def train_step(state):
    """Return logits, loss, gradients and the state after one step."""

    def loss_of(params):
        outputs = dataclasses.replace(state, params=params).model(input_ids=IDS, labels=IDS)
        return outputs.loss, outputs.logits

    (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return logits, loss, grads, state.apply_gradients(grads)


def make():
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def alone():
    return train_step(make().to_state(SGD))


@pytest.fixture(scope="module")
def tokens():
    return make().generate(PROMPT, max_new_tokens=12).sequences


# The slow ones, and more families, in test_mesh_equality.py.
@pytest.fixture(
    scope="module", params=["all", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != "all")]
)
def sharded(request):
    return make().shard_model(mesh=create_mesh(MESHES[request.param]))


def test_logits_loss_gradients_and_a_step_are_equal(alone, sharded):
    logits, loss, grads, state = alone
    logits_8, loss_8, grads_8, state_8 = train_step(sharded.to_state(SGD))
    # float32 sums in another order
    np.testing.assert_allclose(logits_8, logits, atol=1e-5)
    np.testing.assert_allclose(loss_8, loss, atol=1e-5)
    for got, expected in ((grads_8, grads), (state_8.params, state.params)):
        for path, leaf in flatten(expected).items():
            np.testing.assert_allclose(flatten(got)[path], leaf, atol=1e-5, err_msg=path)
    assert len(flatten(grads_8)["lm_head/kernel"].devices()) == 8


@pytest.mark.slow  # as in test_mesh_equality.py
def test_greedy_tokens_are_equal(tokens, sharded):
    np.testing.assert_array_equal(sharded.generate(PROMPT, max_new_tokens=12).sequences, tokens)


def test_optimizer_state_is_sharded_as_its_parameters(sharded):
    state = sharded.to_state(optax.adamw(1e-3))
    split = 0
    for path, leaf in flatten(state.params).items():
        for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
            assert flatten(moment)[path].sharding == leaf.sharding, path
        split += not leaf.sharding.is_fully_replicated
    assert split >= 15


@pytest.fixture
def model():
    return make()


def test_full_sharding_holds_an_eighth_per_device(model):
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    model.fully_shard()
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(model.params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {total // 8}


def test_full_sharding_computes_the_same(alone, model):
    logits, loss, _, _ = alone
    logits_8, loss_8, _, _ = train_step(model.fully_shard().to_state(SGD))
    np.testing.assert_allclose(logits_8, logits, atol=1e-5)
    np.testing.assert_allclose(loss_8, loss, atol=1e-5)


class OddConfig(EasyDeLBaseConfig):
    def __init__(self, width=9, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class Odd(EasyDeLBaseModule):
    def __init__(self, config: OddConfig, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed = nnx.Embed(16, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros((3,)))

    def __call__(self, input_ids):
        return self.norm(self.embed(input_ids))


def test_full_sharding_warns_once_of_what_stays_whole():
    model = Odd(OddConfig(), rngs=nnx.Rngs(0))
    with pytest.warns(
        UserWarning, match=r"2 parameter\(s\) have no dimension divisible by 8 .*norm/bias, norm/scale"
    ) as caught:
        model.fully_shard()
    assert len(caught) == 1
    held = flatten(model.params)
    assert held["norm/scale"].sharding.is_fully_replicated
    assert held["embed/embedding"].addressable_shards[0].data.shape == (2, 9)


def test_sharding_drops_axes_with_one_warning_or_raises():
    model = Odd(OddConfig(), rngs=nnx.Rngs(0))
    with pytest.warns(
        UserWarning, match=r"1 mesh axis\(es\) dropped.*\n  embed/embedding: dimension 1 of size 9"
    ) as caught:
        model.shard_model()
    assert len(caught) == 1
    with pytest.raises(ValueError, match="embed/embedding: dimension 1 of size 9"):
        model.shard_model(strict=True)


@pytest.mark.parametrize("verb", ["gather_model", "fully_gather"])
@pytest.mark.filterwarnings("ignore:.*(have no dimension divisible|mesh axis.*dropped)")
def test_gathering_gives_whole_arrays_on_one_device(verb):
    model = Odd(OddConfig(), rngs=nnx.Rngs(0))
    model.fully_shard()
    assert isinstance(model.count.get_value().sharding, NamedSharding), "other state is placed too"
    getattr(model, verb)()
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.sharding for leaf in leaves} == {SingleDeviceSharding(jax.local_devices()[0])}
