"""base_module.md: Quantization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.paths import flatten

METHODS = ("nf4", "8bit", "a8bit", "a8q", "a4q")


@pytest.mark.filterwarnings("ignore:'a8bit' is calibrated on a few random tokens:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_applying_quantization(case, model, input_ids, method):
    exact = case.logits(model, input_ids)
    kernels = {path for path in flatten(model.params) if path.endswith("/kernel")}
    model.shard_model(mesh=case.mesh)
    result = model.quantize(
        method=method,  # Quantization method
        group_size=64,  # Group size for quantization
        quantization_pattern=".*",  # Regex pattern for layers to quantize
    )
    assert result is model
    is_quant = model.is_quantized
    assert is_quant is True
    assert {f"{layer.path}/kernel" for layer in model.quantization_report.layers} == kernels
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(model.params))
    # Of logits up to 3: 4-bit layers add up to a few tenths, 8-bit ones to a few hundredths
    allowed = 0.5 if method in ("nf4", "a4q") else 0.05
    assert 0 < np.abs(np.asarray(case.logits(model, input_ids)) - exact).max() < allowed
