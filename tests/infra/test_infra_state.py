"""`EasyDeLState`: freezing, moving over a mesh, files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easydel import CheckpointError, LlamaConfig, LlamaForCausalLM, UnsupportedError
from easydel.infra import EasyDeLState
from easydel.paths import flatten, nest
from easydel.sharding import create_mesh

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, attention_dropout=0.1,
)  # fmt: skip
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
IDS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)


def llama(**fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES | fields), rngs=nnx.Rngs(0))


@jax.jit
def update(state):
    grads = jax.grad(lambda params: state.with_params(params).model(IDS, labels=IDS).loss)(state.trainable_params)
    return state.apply_gradients(grads)


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class TestFreezing:
    def test_what_is_frozen_stays_and_has_no_moments(self):
        state = llama().to_state(TX, frozen=[r"layers/[01]/", "embed_tokens"])
        new = update(state)
        moments = flatten(state.opt_state[1][0].mu)
        for path, before in flatten(state.params).items():
            kept = "layers/0/" in path or "layers/1/" in path or "embed_tokens" in path
            assert (path in state.frozen) is kept
            assert (path not in moments) is kept
            assert bool((flatten(new.params)[path] == before).all()) is kept, path

    def test_the_others_are_trained_as_optax_does_alone(self):
        state = llama(num_hidden_layers=1).to_state(TX, trainable="self_attn")
        grads = jax.jit(jax.grad(lambda params: state.with_params(params).model(IDS, labels=IDS).loss))(state.params)
        trained = state.trainable_params
        wanted, own = flatten(trained), flatten(grads)
        tree = {path: own[path] for path in wanted}
        updates, _ = TX.update(tree, TX.init(wanted), wanted)
        expected = optax.apply_updates(wanted, updates)
        for given in (grads, nest(tree)):
            got = flatten(state.apply_gradients(given).params)
            for path in wanted:
                np.testing.assert_array_equal(got[path], expected[path], err_msg=path)

    def test_says_how_much_is_trained(self):
        state = llama().to_state(optax.adam(0.1), trainable=["lm_head", "norm"])
        summary = state.summary()
        trained = sum(leaf.size for leaf in flatten(state.trainable_params).values())
        assert (summary.trainable, summary.total) == (trained, sum(x.size for x in jax.tree.leaves(state.params)))
        assert summary.optimizer_bytes == 2 * 4 * trained + 4
        assert f"{trained:,} of {summary.total:,}" in str(summary)
        assert summary.groups["model/layers/*/mlp/up_proj/kernel"] == (3 * 16 * 24, 0)
        assert summary.table().row_count == len(summary.groups)

    def test_refuses_what_cannot_be_meant(self):
        model = llama()
        with pytest.raises(ValueError, match="'model/norm/scales' matches no parameter; nearest"):
            model.to_state(TX, frozen="model/norm/scales")
        with pytest.raises(ValueError, match="not both"):
            model.to_state(TX, frozen="norm", trainable="mlp")
        with pytest.raises(ValueError, match="leaves no parameter to train"):
            model.to_state(TX, frozen=".")
        with pytest.raises(ValueError, match="params must be a tree like"):
            model.to_state(TX).with_params({"lm_head": model.params["lm_head"]})

    def test_stacked_layers_freeze_together_or_not_at_all(self):
        model = llama(scan_layers=True)
        state = model.to_state(TX, frozen=r"layers/\d+/")
        new = update(state)
        assert all("layers" not in path for path in flatten(new.trainable_params))
        same(new.params["model"]["layers"], state.params["model"]["layers"])
        assert (new.params["lm_head"]["kernel"] != state.params["lm_head"]["kernel"]).any()
        with pytest.raises(UnsupportedError, match="scan_layers=False"):
            model.to_state(TX, frozen="layers/0/")


class TestMoving:
    def test_moments_lie_as_their_parameters(self):
        state = llama().to_state(TX)
        mesh = create_mesh((1, 4, 1, 2, 1))
        sharded = state.shard_state(mesh=mesh)
        kernel = sharded.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        assert kernel.sharding == NamedSharding(mesh, P("fsdp", "tp"))
        for path, leaf in flatten(sharded.params).items():
            for moment in (sharded.opt_state[1][0].mu, sharded.opt_state[1][0].nu):
                assert flatten(moment)[path].sharding == leaf.sharding, path
        assert sharded.opt_state[1][0].count.sharding == NamedSharding(mesh, P())
        assert sharded.model.is_sharded
        assert sharded.model.mesh == mesh
        same(sharded.params, state.params)
        back = sharded.gather_state()
        for part in ("params", "opt_state", "other", "step"):
            same(getattr(back, part), getattr(state, part))
        assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(back))

    def test_optimizers_of_many_kinds_are_made_on_the_mesh(self):
        model = llama(num_hidden_layers=1).shard_model(mesh=create_mesh((1, 4, 1, 2, 1)))
        factored = optax.adafactor(1e-3, min_dim_size_to_factor=4)
        labels = lambda params: jax.tree.map(lambda x: "one" if x.ndim == 1 else "more", params)  # noqa: E731
        mixed = optax.multi_transform({"one": optax.sgd(0.1), "more": optax.lion(0.1)}, labels)
        for tx in (factored, mixed, optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()):
            state = model.to_state(tx)
            assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.opt_state))
            assert int(update(state).step) == 1
        moment = flatten(model.to_state(mixed).opt_state.inner_states["more"].inner_state[0].mu)
        kernel = moment["model/layers/0/mlp/up_proj/kernel"]
        assert kernel.sharding.spec == P("fsdp", "tp")


class TestFiles:
    def test_comes_back_bit_by_bit_and_goes_on_alike(self, tmp_path):
        state = update(llama(num_hidden_layers=1).to_state(TX, frozen="embed_tokens"))
        state.save_state(tmp_path / "state")
        loaded = EasyDeLState.load_state(tmp_path / "state", TX)
        assert int(loaded.step) == 1
        assert loaded.frozen == state.frozen
        same(loaded.params, state.params)
        same(loaded.opt_state, state.opt_state)
        same(loaded.other, state.other)
        same(update(loaded).params, update(state).params)
        with pytest.raises(FileExistsError):
            state.save_state(tmp_path / "state")

    @pytest.mark.parametrize("scan", [False, True])
    def test_comes_back_on_another_mesh(self, tmp_path, scan):
        state = llama(scan_layers=scan, num_hidden_layers=2).shard_model(mesh=create_mesh((1, 8, 1, 1, 1))).to_state(TX)
        state.save_state(tmp_path / "state")
        mesh = create_mesh((1, 2, 1, 2, 2))
        loaded = EasyDeLState.load_state(tmp_path / "state", TX, mesh=mesh)
        same(loaded.params, state.params)
        same(loaded.opt_state, state.opt_state)
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves((loaded.params, loaded.opt_state))} == {mesh}
        expected = state.shard_state(mesh=mesh)
        assert jax.tree.map(lambda a: a.sharding.spec, loaded.params) == jax.tree.map(
            lambda a: a.sharding.spec, expected.params
        )

    def test_refuses_another_optimizer_class_or_directory(self, tmp_path):
        llama(num_hidden_layers=1).to_state(TX).save_state(tmp_path / "state")
        with pytest.raises(CheckpointError, match=r"opt_state/1/0/mu/.*not expected"):
            EasyDeLState.load_state(tmp_path / "state", optax.sgd(0.1))
        with pytest.raises(CheckpointError, match="of a LlamaForCausalLM, not of a Other"):
            EasyDeLState.load_state(tmp_path / "state", TX, model_class=type("Other", (LlamaForCausalLM,), {}))
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            EasyDeLState.load_state(tmp_path / "nothing", TX)
