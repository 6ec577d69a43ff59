"""`a8bit` against `8bit` where inputs differ in size, and what is observed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from easydel.quantization import quantized_layers
from easydel.quantization.calibration import EXPONENTS, observe
from easydel.quantization.choose import candidates
from easydel.stacked import layer_paths
from tests.quantization.tiny import CALIBRATION, IDS, assert_unharmed, held, llama, logits


def shallow():
    return llama(num_hidden_layers=1)


def planted():
    """Return a model with channels 100 times as large between norms and projections, to no other effect."""
    model = shallow()
    for layer in model.model.layers:
        for norm, layers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            factor = jnp.ones(64).at[jnp.asarray([3, 17, 40])].set(100.0)
            norm.scale.set_value(norm.scale.get_value() * factor)
            for linear in layers:
                linear.kernel.set_value(linear.kernel.get_value() / factor[:, None])
    return model


def test_a8bit_beats_8bit_on_planted_outliers():
    exact = logits(planted())
    np.testing.assert_allclose(exact, logits(shallow()), atol=1e-4)  # the planted factors cancel
    plain = np.abs(logits(planted().quantize("8bit")) - exact).mean()
    aware = np.abs(logits(planted().quantize("a8bit", calibration=CALIBRATION)) - exact).mean()
    assert aware < 0.5 * plain


def test_observed_inputs_are_those_of_the_layers():
    model = shallow()
    before = held(model)
    first = [one for one in candidates(model) if one.path == "model/layers/0/self_attn/q_proj"]
    notes = observe(model, first, [{"input_ids": IDS}, {"input_ids": IDS[:1]}])
    assert_unharmed(model, before)
    block = model.model.layers[0]
    given = np.asarray(block.input_layernorm(model.model.embed_tokens(IDS)), np.float64).reshape(16, 64)
    seen = notes["model/layers/0/self_attn/q_proj"]
    assert seen.count == 24
    np.testing.assert_allclose(seen.total, np.abs(given).sum(0) + np.abs(given[:8]).sum(0), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(seen.rows)[:16], given, rtol=1e-5, atol=1e-6)


def test_stacked_layers_are_calibrated_as_single_ones_are():
    batches = [{"input_ids": IDS}]
    single, stacked = (llama(scan_layers=scan).quantize("a8bit", calibration=batches) for scan in (False, True))
    layers = quantized_layers(single)
    for path, layer in quantized_layers(stacked).items():
        for index, name in enumerate(layer_paths(path) or [path]):
            for part, variable in layers[name].weight_variables().items():
                got = np.asarray(layer.weight_variables()[part].get_value())
                got = got if layer_paths(path) is None else got[index]
                # The same operations on the same numbers, up to a rounding of the mean magnitudes.
                wanted = np.asarray(variable.get_value(), np.float64)
                close = {"codes": {"atol": 1}, "scales": {"rtol": 1e-5}, "input_scale": {"rtol": 1e-5}}
                np.testing.assert_allclose(got, wanted, err_msg=f"{name}/{part}", **({"rtol": 0} | close[part]))
    assert "0:2:1" in next(path for path in quantized_layers(stacked) if "mlp" in path)
    np.testing.assert_allclose(logits(stacked), logits(single), atol=1e-5)  # a scan adds up in another order


def test_without_batches_it_warns_and_factors_are_powers_of_the_mean():
    model = shallow()
    with pytest.warns(UserWarning, match="calibrated on a few random tokens"):
        model.quantize("a8bit")
    scale = np.asarray(model.lm_head.input_scale.get_value())
    assert (scale > 0).all()
    again = shallow().quantize("a8bit", calibration=[{"input_ids": IDS}])
    notes = observe(shallow(), [one for one in candidates(shallow()) if one.path == "lm_head"], [{"input_ids": IDS}])
    mean = notes["lm_head"].total / notes["lm_head"].count
    mean = mean / np.exp(np.log(mean).mean())
    got = np.asarray(again.lm_head.input_scale.get_value())
    assert any(np.allclose(got, mean**exponent, rtol=1e-4) for exponent in EXPONENTS)
