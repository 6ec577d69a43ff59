"""What an adapted layer computes, held against formulas in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import EasyDeLBaseModule, LoraConfig
from easydel.errors import UnsupportedError
from easydel.layers import Embed
from easydel.layers.linear import Linear
from easydel.layers.moe.experts import ExpertLinear
from easydel.lora.adapters import adapted_layers
from tests.lora.tiny import randomise

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
SUMS = 3e-6  # float32 against float64: sums of 8 and 4 products


class Config:
    """As little as a config can be."""


class Holder(EasyDeLBaseModule):
    """One layer of every kind."""

    def __init__(self, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(Config(), rngs=rngs)
        self.ours = Linear(8, 6, rngs=rngs, **options)
        self.plain = nnx.Linear(8, 6, rngs=rngs, **options)
        self.general = nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=rngs, **options)
        self.experts = ExpertLinear((3, 8, 6), init_stddev=0.5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.table = Embed(10, 6, padding_idx=1, rngs=rngs)
        self.plain_table = nnx.Embed(10, 6, rngs=rngs)


def holder(pattern: str, rank: int = 4, alpha: float = 6, **options: Any) -> Holder:
    made = Holder(nnx.Rngs(0))
    made.ours.bias.set_value(jnp.arange(6.0))
    made.apply_lora_to_layers(rank, alpha, pattern, **options)
    return made


def wide(variable: Any) -> np.ndarray:
    return np.asarray(variable.get_value(), np.float64)


def test_linear_layers_add_the_product_of_their_adapters() -> None:
    model = randomise(holder("ours|plain|general"), scale=0.5)
    for name, inputs in (("ours", X), ("plain", X), ("general", X.reshape(2, 3, 2, 4))):
        layer = getattr(model, name)
        kernel = wide(layer.kernel).reshape(8, 6)
        bias = wide(layer.bias).reshape(6)
        flat = X.astype(np.float64)
        want = flat @ kernel + bias + 1.5 * flat @ wide(layer.lora.a) @ wide(layer.lora.b)
        got = np.asarray(layer(inputs)).reshape(2, 3, 6)
        np.testing.assert_allclose(got, want, rtol=0, atol=SUMS * np.abs(want).max(), err_msg=name)


def test_dora_scales_directions_by_magnitudes() -> None:
    model = randomise(holder("ours|plain|general", use_dora=True), scale=0.5)
    for name, inputs in (("ours", X), ("plain", X), ("general", X.reshape(2, 3, 2, 4))):
        layer = getattr(model, name)
        weight = wide(layer.kernel).reshape(8, 6) + 1.5 * wide(layer.lora.a) @ wide(layer.lora.b)
        weight = weight * wide(layer.lora.magnitude) / np.linalg.norm(weight, axis=0)
        want = X.astype(np.float64) @ weight + wide(layer.bias).reshape(6)
        got = np.asarray(layer(inputs)).reshape(2, 3, 6)
        np.testing.assert_allclose(got, want, rtol=0, atol=SUMS * np.abs(want).max(), err_msg=name)


def test_experts_and_embeddings_hold_adapted_weights() -> None:
    model = randomise(holder("experts|table", embeddings=True), scale=0.5)
    lora = model.experts.lora
    whole = wide(model.experts.kernel) + 1.5 * np.einsum("eir,ero->eio", wide(lora.a), wide(lora.b))
    rows, sizes = X.reshape(6, 8), np.int32([2, 0, 4])
    want = np.einsum("ri,rio->ro", rows.astype(np.float64), whole[np.repeat(np.arange(3), sizes)])
    got = model.experts.product(rows, sizes, mechanism="auto", precision=None)
    np.testing.assert_allclose(got, want, rtol=0, atol=SUMS * np.abs(want).max())
    ids = jnp.asarray([[0, 1, 9], [3, 3, 2]])
    for table in (model.table, model.plain_table):
        whole = wide(table.embedding) + 1.5 * wide(table.lora.a) @ wide(table.lora.b)
        np.testing.assert_allclose(table(ids), whole[np.asarray(ids)], rtol=0, atol=SUMS * np.abs(whole).max())
    assert np.isnan(np.asarray(model.table(jnp.asarray([10, -1])))).all()  # outside the vocabulary, as without adapter

    graphdef, params, rest = nnx.split(model.table, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda params: nnx.merge(graphdef, params, rest)(ids).sum())(params)
    gradient = np.asarray(gradients["lora"]["a"].get_value())
    assert not gradient[1].any()  # the padding token learns nothing
    assert gradient[3].any()


def test_new_adapters_are_as_peft_s_default_and_change_nothing() -> None:
    model = Holder(nnx.Rngs(0))
    before = {name: np.asarray(getattr(model, name)(X)) for name in ("ours", "plain")}
    model.apply_lora_to_layers(512, 16, "ours|plain|experts|table", embeddings=True, rngs=nnx.Rngs(5))
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(model, name)(X), value)
    a = np.asarray(model.ours.lora.a.get_value())
    bound = 8**-0.5
    assert 0.98 * bound < np.abs(a).max() <= bound
    assert abs(a.std() / (bound / 3**0.5) - 1) < 0.03  # uniform: 4096 numbers scatter by a hundredth
    assert not np.asarray(model.ours.lora.b.get_value()).any()
    assert np.abs(np.asarray(model.experts.lora.a.get_value())).max() <= bound
    b = np.asarray(model.table.lora.b.get_value())
    assert not np.asarray(model.table.lora.a.get_value()).any()
    assert abs(b.std() - 1) < 0.05
    assert not np.array_equal(a, np.asarray(model.plain.lora.a.get_value()))  # each layer has a key of its own
    again = Holder(nnx.Rngs(0)).apply_lora_to_layers(512, 16, "ours", rngs=nnx.Rngs(6))
    assert not np.array_equal(a, np.asarray(again.ours.lora.a.get_value()))


def test_scales_and_ranks_by_pattern() -> None:
    model = holder("ours|plain|general", use_rslora=True, rank_pattern={"plain": 9}, alpha_pattern={"gen": 2.0})
    held = {
        name: (layer.lora.a.get_value().shape[-1], float(layer.lora.scale.get_value()))
        for name, layer in adapted_layers(model).items()
    }
    assert held == {"ours": (4, 3.0), "plain": (9, 2.0), "general": (4, 1.0)}


def test_dropout_is_drawn_in_training_only() -> None:
    model = randomise(holder("ours", lora_dropout=0.5))
    layer = model.ours
    still = np.asarray(layer(X))
    np.testing.assert_array_equal(still, layer(X))
    model.train()
    one, two = np.asarray(layer(X)), np.asarray(layer(X))
    assert not np.array_equal(one, two)
    base = X @ np.asarray(layer.kernel.get_value()) + np.asarray(layer.bias.get_value())
    # The mean over many draws is what is computed without dropout: inverted dropout keeps expectations.
    draws = np.mean([np.asarray(layer(X)) for _ in range(400)], axis=0)
    scatter = np.abs(still - base).max()
    assert np.abs(draws - still).max() < 0.5 * scatter
    model.eval()
    np.testing.assert_array_equal(layer(X), still)


def test_dora_with_dropout_drops_the_base_s_input_too() -> None:
    model = randomise(holder("ours", lora_dropout=0.5, use_dora=True))
    layer = model.ours
    model.train()
    dropped = np.asarray(nnx.clone(layer).lora.dropout(jnp.asarray(X)), np.float64)
    got = np.asarray(layer(X))
    kernel, product = wide(layer.kernel), 1.5 * wide(layer.lora.a) @ wide(layer.lora.b)
    ratio = wide(layer.lora.magnitude) / np.linalg.norm(kernel + product, axis=0)
    want = X @ kernel + wide(layer.bias) + (ratio - 1) * (dropped @ kernel) + ratio * (dropped @ product)
    np.testing.assert_allclose(got, want, rtol=0, atol=SUMS * np.abs(want).max())


def test_adapters_are_float32_and_compute_as_their_layer_does() -> None:
    model = Holder(nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model.apply_lora_to_layers(4, 8, "ours")
    assert model.ours.lora.a.get_value().dtype == jnp.float32
    assert model.ours(X).dtype == jnp.bfloat16
    model.to_dtype(jnp.float16)
    assert model.ours.lora.a.get_value().dtype == jnp.float16


def test_adapted_layers_are_layers_like_any_other() -> None:
    model = randomise(holder("ours"))
    layer = model.ours
    assert isinstance(layer, Linear)
    assert type(layer) is type(holder("ours").ours)  # one class, or nothing compiled would be found again
    for copied in (
        nnx.clone(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        nnx.merge(*nnx.split(layer)),
    ):
        assert type(copied) is type(layer)
        np.testing.assert_array_equal(copied(X), layer(X))
    leaves, tree = jax.tree.flatten(layer)
    np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves)(X), layer(X))
    model.delete_adapter("default")
    assert nnx.graphdef(layer) == nnx.graphdef(Holder(nnx.Rngs(0)).ours)
    assert type(layer) is Linear


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("experts", {"lora_dropout": 0.1}), ("experts", {"use_dora": True}), ("^table", {"use_dora": True})],
)
def test_what_experts_and_embeddings_lack_is_named(pattern: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=rf"{pattern.strip('^')}: .* is not supported for adapters of"):
        Holder(nnx.Rngs(0)).apply_lora_to_layers(4, 8, pattern, embeddings=True, **options)


def test_configs_refuse_what_is_out_of_range() -> None:
    for fields, message in (
        ({"rank": 0}, "lora_rank=0: the rank"),
        ({"rank": 2.5}, "lora_rank=2.5"),
        ({"rank": True}, "lora_rank=True"),
        ({"alpha": float("nan")}, "lora_alpha=nan"),
        ({"dropout": 1.0}, "lora_dropout=1.0"),
        ({"dropout": -0.1}, "lora_dropout=-0.1"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '\\('"),
        ({"rank_pattern": [1]}, "expected a mapping"),
        ({"use_dora": 1}, "use_dora=1"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**fields)  # type: ignore[arg-type]
    made = LoraConfig(rank=3, rank_pattern={"q": 2}, pattern="q|v", use_rslora=True)
    assert LoraConfig.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="no field ranc"):
        LoraConfig.from_dict({"ranc": 1})
