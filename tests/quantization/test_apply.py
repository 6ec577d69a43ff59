"""`quantize` and `dequantize`: what is swapped, what is left alone, what is refused with the model unharmed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import EasyDeLBaseModule, MixtralConfig, MixtralForCausalLM, UnsupportedError
from easydel.paths import flatten, named_modules
from easydel.quantization import QuantizedExpertLinear, QuantizedLinear, quantized_layers
from tests.quantization.tiny import IDS, METHODS, assert_unharmed, held, llama, logits, quantize
from tests.spec.user_models import MyModelConfig

# Largest error of logits (of size 0.5) for the methods' bits; seen here: nf4 0.05, a4q 0.07, int8 0.005.
ERRORS = {"nf4": 0.2, "8bit": 0.02, "a8bit": 0.02, "a8q": 0.02, "a4q": 0.3}


def quick(*names):
    """Return the methods, all but these with the slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def shallow():
    """Return a model of one layer, where several would prove no more."""
    return llama(num_hidden_layers=1)


@pytest.mark.parametrize("method", quick("nf4", "a8bit", "a4q"))
def test_quantize_and_dequantize(method):
    model = shallow()
    exact, structure = logits(model), nnx.graphdef(model)
    assert quantize(model, method) is model
    assert model.is_quantized
    near = logits(model)
    assert 0 < np.abs(near - exact).max() < ERRORS[method]
    assert set(quantized_layers(model)) == {
        path for path, layer in named_modules(shallow()).items() if isinstance(layer, nnx.Linear)
    }
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in flatten(model.params).values())
    assert not [path for path in flatten(model.params) if path.endswith(("codes", "scales", "kernel"))]
    assert model.dequantize() is model
    assert not model.is_quantized
    assert nnx.graphdef(model) == structure  # so compiled programs of the float model serve it again
    if method in ("nf4", "8bit", "a8bit"):  # a8q and a4q round activations, too
        np.testing.assert_allclose(logits(model), near, atol=1e-5)


def test_gradients_by_params_and_generation():
    model = shallow()
    model.generate(IDS, max_new_tokens=4, do_sample=False)  # compiled for the float model
    model.quantize("a4q")
    fn = model.pure_transform_fn()
    loss = jax.jit(jax.grad(lambda params: fn(params, {"input_ids": IDS, "labels": IDS}).loss))
    gradients = loss(model.params)
    assert all(np.abs(leaf).max() > 0 for leaf in flatten(gradients).values())
    after = model.generate(IDS, max_new_tokens=4, do_sample=False).sequences
    plain = shallow().quantize("a4q")
    ids = np.pad(np.asarray(IDS), ((0, 0), (0, 4)))  # no position sees what comes after it: one program for all lengths
    for place in range(8, 12):  # without cache, without generation's compiled functions
        ids[:, place] = logits(plain, jnp.asarray(ids))[:, place - 1].argmax(-1)
    np.testing.assert_array_equal(after, ids)


def test_compiled_functions_never_serve_the_old_model():
    model = shallow()
    call = nnx.jit(lambda model, ids: model(ids).logits)
    results = [np.asarray(call(model, IDS))]
    for method in ("nf4", "8bit"):
        model.quantize(method)
        results.append(np.asarray(call(model, IDS)))
        np.testing.assert_allclose(results[-1], np.asarray(model(IDS).logits), atol=1e-5)
        model = shallow()
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[1], results[2])


def test_pattern_chooses_layers():
    model = llama().quantize("8bit", quantization_pattern=r"layers/1/mlp")
    assert [*quantized_layers(model)] == [f"model/layers/1/mlp/{name}_proj" for name in ("down", "gate", "up")]


def test_tied_heads_embeddings_norms_and_routers_stay():
    model = llama(tie_word_embeddings=True).quantize("8bit")
    assert "lm_head" not in quantized_layers(model)
    kept = {path.rpartition("/")[2] for path in flatten(model.params)}
    assert kept == {"embedding", "scale"}
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    experts = MixtralForCausalLM(config, rngs=nnx.Rngs(0))
    exact = logits(experts, IDS % 32)
    experts.quantize("a8q", group_size=8)
    assert "model/layers/0/mlp/gate/kernel" in flatten(experts.params)
    layers = quantized_layers(experts)
    assert isinstance(layers["model/layers/0/mlp/experts/up_proj"], QuantizedExpertLinear)
    assert 0 < np.abs(logits(experts, IDS % 32) - exact).max() < 0.02
    assert 0 < experts.quantization_report.largest_error < 0.01


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "int3"}, ValueError, "unknown quantization method 'int3'; choose one of 'nf4', '8bit'"),
        ({"group_size": 0}, ValueError, "group_size=0: expected a positive integer"),
        ({"group_size": 6.4}, ValueError, "group_size=6.4"),
        ({"group_size": True}, ValueError, "group_size=True"),
        ({"quantization_pattern": "q_prj$"}, ValueError, r"matches no linear layer; nearest: .*q_proj"),
        ({"quantization_pattern": ".*norm.*"}, ValueError, "matches no linear layer"),
        ({"quantization_pattern": "("}, ValueError, "not a regular expression"),
        ({"quantization_pattern": None}, ValueError, "expected a regular expression"),
        ({"method": "8bit", "calibration": [IDS]}, ValueError, "'a8bit' only"),
        ({"method": "a8bit", "calibration": []}, ValueError, "expected a list of batches"),
        ({"method": "a8bit", "calibration": [{"inputs": 1}]}, TypeError, "takes no 'inputs'"),
    ],
)
def test_refused_with_the_model_unharmed(options, error, message):
    model = llama()
    before = held(model)
    with pytest.raises(error, match=message):
        model.quantize(**options)
    assert_unharmed(model, before)
    assert not model.is_quantized
    assert model.quantization_report is None


def test_twice_nothing_and_what_is_not_finite():
    model = llama()
    with pytest.raises(ValueError, match="not quantized"):
        model.dequantize()
    kernel = model.lm_head.kernel
    kernel.set_value(kernel.get_value().at[0, 0].set(jnp.inf))
    before = held(model)
    with pytest.raises(ValueError, match="lm_head hold infinite"):
        model.quantize()
    assert_unharmed(model, before)
    model.quantize(quantization_pattern="mlp")
    before = held(model)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("8bit", quantization_pattern="self_attn")
    assert_unharmed(model, before)


ODD = [("nf4", 7), ("a4q", 1000)]
ODD_TOO = [("nf4", 1), ("nf4", 1000), ("a4q", 7), ("a4q", 1)]


@pytest.mark.parametrize(("method", "size"), [*ODD, *(pytest.param(*case, marks=pytest.mark.slow) for case in ODD_TOO)])
def test_odd_group_sizes(size, method):
    model = shallow()
    exact = logits(model)
    model.quantize(method, group_size=size)
    assert np.abs(logits(model) - exact).max() < ERRORS[method]


def test_stacked_layers_quantize_as_single_ones_do():
    for method in ("nf4", "8bit", "a8q"):
        single, stacked = llama().quantize(method), llama(scan_layers=True).quantize(method)
        # A scan adds up in another order
        np.testing.assert_allclose(logits(stacked), logits(single), atol=1e-5)
        pairs = zip(single.quantization_report.layers, stacked.quantization_report.layers, strict=True)
        for one, two in pairs:
            assert (one.path, one.bytes_after) == (two.path, two.bytes_after)
            assert one.relative_error == pytest.approx(two.relative_error, rel=1e-4)
    model = llama(scan_layers=True)
    with pytest.raises(UnsupportedError, match=r"matches model/layers/0/.*but not model/layers/1"):
        model.quantize(quantization_pattern="layers/0")
    assert not model.is_quantized


class Odd(EasyDeLBaseModule):
    """A user's class: a general layer over several axes, a layer under two names, and one in a plain dict."""

    def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed_tokens = nnx.Embed(config.vocab_size, 12, rngs=rngs)
        self.into = nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.out_of = nnx.LinearGeneral((3, 4), 12, axis=(-1, -2), use_bias=False, rngs=rngs)
        self.shared = nnx.Linear(12, 12, rngs=rngs)
        self.again = self.shared
        self.named = nnx.Dict(head=nnx.Linear(12, config.vocab_size, rngs=rngs))

    def __call__(self, input_ids):
        hidden = self.out_of(jnp.tanh(self.into(self.embed_tokens(input_ids))))
        return self.named["head"](self.again(self.shared(hidden)))


@pytest.mark.parametrize("method", quick("nf4", "a8q", "a4q"))
def test_general_shared_and_named_layers(method):
    model = Odd(MyModelConfig(vocab_size=64), rngs=nnx.Rngs(0))
    exact = logits(model)
    quantize(model, method, group_size=4)
    assert model.again is model.shared
    assert isinstance(model.shared, QuantizedLinear)
    assert len(quantized_layers(model)) == 4
    # Of logits up to 3: no more than each layer's error added up, four layers of 0.1 (4 bits) or 0.01 (8 bits)
    assert np.abs(logits(model) - exact).max() < 0.4 * np.abs(exact).max() * (0.1 if "8" in method else 1)
    model.dequantize()
    assert model.again is model.shared
    assert model.into.kernel.get_value().shape == (12, 3, 4)
    assert np.abs(logits(model) - exact).max() < 0.4 * np.abs(exact).max()


def test_what_would_be_ignored_is_refused():
    model = Odd(MyModelConfig(vocab_size=64), rngs=nnx.Rngs(0))
    model.shared.dot_general = lambda *args, **options: jax.lax.dot_general(*args, **options)
    with pytest.raises(UnsupportedError, match=r"again.*dot_general of its own"):
        model.quantize()
    assert not model.is_quantized
    model.quantize(quantization_pattern="head|into")
    assert [*quantized_layers(model)] == ["into", "named/head"]


def test_report():
    model = llama().quantize("nf4")
    report = model.quantization_report
    assert len(report.layers) == 15
    assert report.bytes_before == sum(4 * np.prod(layer.shape) for layer in report.layers)
    stored = [array.nbytes for path, array in held(model).items() if path.endswith(("codes", "scales"))]
    assert report.bytes_after == sum(stored)
    assert report.bytes_after <= 0.16 * report.bytes_before
    assert llama().quantize("8bit").quantization_report.bytes_after <= 0.29 * report.bytes_before
    assert str(report).startswith("nf4, groups of 64: 15 layers")
    assert report.table().row_count == 15
    layer = report.to_dict()["layers"][0]
    assert layer["path"] == "lm_head"
    kernel = np.asarray(llama().lm_head.kernel.get_value(), np.float64)
    back = np.asarray(model.lm_head.dequantized())
    assert layer["relative_error"] == pytest.approx(np.linalg.norm(back - kernel) / np.linalg.norm(kernel), rel=1e-4)


def test_other_rooms_see_a_quantized_model():
    import torch

    model = shallow().quantize("nf4")
    assert model.get_lm_head() is model.lm_head
    assert model.get_embedding() is model.model.embed_tokens
    with pytest.raises(UnsupportedError, match="resize before adapters or quantization"):
        model.resize_token_embeddings(80)
    assert model.flops_per_token(1, 8) == shallow().flops_per_token(1, 8)
    codes = held(model)
    model.to_dtype(jnp.bfloat16)
    assert logits(model).dtype == jnp.bfloat16
    for path, array in codes.items():
        if path.endswith(("codes", "scales")):
            np.testing.assert_array_equal(held(model)[path], array)
    tensors = shallow().quantize("nf4").to_torch()
    kernel = shallow().quantize("nf4").dequantize().lm_head.kernel.get_value()
    assert torch.equal(tensors["lm_head.weight"], torch.from_numpy(np.array(kernel.T)))
    assert tensors.keys() == shallow().to_torch().keys()
