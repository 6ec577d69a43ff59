"""Pure functions, states and merging: nothing leaks, nothing changes places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, LlamaConfig, LlamaForCausalLM
from easydel.infra.functional import bind, split
from easydel.paths import flatten, nest

IDS = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)


class DeepConfig(EasyDeLBaseConfig):
    def __init__(self, depth=12, width=8, dropout=0.0, **kwargs):
        self.depth, self.width, self.dropout = depth, width, dropout
        super().__init__(**kwargs)


class Deep(EasyDeLBaseModule):
    """Twelve layers whose order matters, with dropout between them and a running count."""

    def __init__(self, config: DeepConfig, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed = nnx.Embed(16, config.width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(config.width, config.width, rngs=rngs) for _ in range(config.depth)])
        self.drops = nnx.List([nnx.Dropout(config.dropout, rngs=rngs) for _ in range(2)])
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, input_ids):
        self.calls.set_value(self.calls.get_value() + 1)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = jnp.tanh(layer(hidden)) * 2
        return hidden

    def masks(self, input_ids):
        ones = jnp.ones((*input_ids.shape, 64))
        return [drop(ones) for drop in self.drops]


class Masks(Deep):
    def __call__(self, input_ids):
        return jnp.stack(self.masks(input_ids))


def by_numpy(model) -> np.ndarray:
    """Run the layers in numeric order, in float64."""
    params = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model.params).items()}
    hidden = params["embed/embedding"][np.asarray(IDS)]
    for index in range(model.config.depth):
        hidden = 2 * np.tanh(hidden @ params[f"layers/{index}/kernel"] + params[f"layers/{index}/bias"])
    return hidden


@pytest.fixture
def deep():
    return Deep(DeepConfig(), rngs=nnx.Rngs(0))


def state_of(module) -> list[np.ndarray]:
    leaves = jax.tree.leaves(nnx.state(module))
    return [np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda m: lambda: m.pure_transform_fn()(m.params, IDS),
        lambda m: lambda: jax.jit(m.pure_transform_fn())(m.params, {"input_ids": IDS}),
        lambda m: lambda: m.to_state(optax.sgd(0.1)).model(IDS),
        lambda m: lambda: m.merge_module(*m.split_module())(IDS),
        lambda m: lambda: nnx.clone(m).merge_params_dict(m.split_params_dict())(IDS),
        lambda m: lambda: Deep(m.config, rngs=nnx.Rngs(9)).merge_params_dict(m.split_params_dict())(IDS),
        lambda m: lambda: Deep(m.config, rngs=nnx.Rngs(9)).merge_params(m.split_params())(IDS),
        lambda m: lambda: bind(m.graphdef, m.split_params(), split(m)[2])(IDS),
    ],
    ids=["pure", "pure_jit", "state", "merge_module", "merge_dict", "merge_dict_other", "merge_state", "bind_state"],
)
def test_layer_10_stays_behind_layer_2(deep, rebuild):
    # float32 against float64 through twelve layers of slope up to two
    np.testing.assert_allclose(rebuild(deep)(), by_numpy(deep), atol=1e-3)


def test_twelve_llama_layers_keep_their_order():
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    expected = jax.jit(lambda ids: model(ids).logits)(IDS)
    pure = jax.jit(model.pure_transform_fn())
    np.testing.assert_allclose(pure(model.params, IDS).logits, expected, atol=1e-5)
    swapped = flatten(model.params)
    keys = ("model/layers/2/mlp/up_proj/kernel", "model/layers/10/mlp/up_proj/kernel")
    swapped[keys[0]], swapped[keys[1]] = swapped[keys[1]], swapped[keys[0]]
    different = pure(nest(swapped), IDS).logits
    assert np.abs(different - expected).max() > 1e-3, "the order of layers must show in the logits"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("rngs", [None, 3], ids=["no_rngs", "rngs"])
def test_the_pure_function_leaves_the_model_as_it_was(compiled, rngs):
    model = Deep(DeepConfig(dropout=0.5), rngs=nnx.Rngs(0))
    before = state_of(model)
    fn = model.pure_transform_fn()
    fn = jax.jit(fn) if compiled else fn
    for _ in range(2):
        fn(model.params, IDS, None if rngs is None else jax.random.key(rngs))
    assert len(before) == len(state_of(model))
    for old, new in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


class TestDropout:
    @pytest.fixture
    def model(self):
        return Masks(DeepConfig(dropout=0.5), rngs=nnx.Rngs(0))

    def test_is_off_without_rngs(self, model):
        model.train()
        assert (model.pure_transform_fn()(model.params, IDS) == 1).all()

    @pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
    def test_differs_per_layer_and_follows_the_key(self, model, key):
        fn = jax.jit(model.pure_transform_fn())
        one, again, other = (np.asarray(fn(model.params, IDS, key(seed))) for seed in (1, 1, 2))
        assert set(np.unique(one)) == {0.0, 2.0}
        np.testing.assert_array_equal(one, again)
        assert (one[0] != one[1]).any(), "two layers share a mask"
        assert (one != other).any()

    def test_takes_rngs_objects(self, model):
        masks = model.pure_transform_fn()(model.params, IDS, nnx.Rngs(5))
        assert (masks == 0).any()

    def test_follows_train_and_eval(self, model):
        model.train()
        assert (model(IDS) == 0).any()
        model.eval()
        assert (model(IDS) == 1).all()


class TestState:
    def test_is_not_changed_by_the_models_it_gives_out(self):
        state = Deep(DeepConfig(dropout=0.5), rngs=nnx.Rngs(0)).to_state(optax.sgd(0.1))
        first, second = state.model, state.model
        first(IDS)
        first.half()
        assert float(second.calls.get_value()) == 0
        assert float(state.model.calls.get_value()) == 0
        assert state.model.module_dtype == jnp.float32

    def test_is_not_changed_by_the_model_it_was_made_from(self, deep):
        state = deep.to_state(optax.sgd(0.1))
        deep(IDS)
        assert float(state.model.calls.get_value()) == 0

    def test_passes_through_jit_and_shares_arrays(self, deep):
        state = deep.to_state(optax.adam(0.1))
        leaves = {id(leaf) for leaf in jax.tree.leaves(state.params)}
        assert leaves == {id(leaf) for leaf in jax.tree.leaves(deep.params)}
        same = jax.jit(lambda s: s)(state)
        np.testing.assert_allclose(same.model(IDS), by_numpy(deep), atol=1e-3)

    def test_refuses_what_is_no_optimizer_and_no_gradient(self, deep):
        with pytest.raises(TypeError, match="expected an optax optimizer"):
            deep.to_state(0.1)
        state = deep.to_state(optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"tree like state\.params"):
            state.apply_gradients({"embed": state.params["embed"]})

    def test_sgd_step_by_hand(self, deep):
        state = deep.to_state(optax.sgd(0.5))
        new = jax.jit(lambda s: s.apply_gradients(jax.tree.map(jnp.ones_like, s.params)))(state)
        assert (int(state.step), int(new.step)) == (0, 1)
        for path, leaf in flatten(new.params).items():
            np.testing.assert_array_equal(leaf, flatten(state.params)[path] - 0.5, err_msg=path)
