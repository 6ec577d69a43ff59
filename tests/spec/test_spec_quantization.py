"""base_module.md: Quantization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel.paths import flatten
from tests.spec.conftest import CLASSES

METHODS = ("nf4", "8bit", "a8bit", "a8q", "a4q")
# Each method on a Llama, but the costly calibration on a class that is quickly compiled
QUICK = {("llama-8", method) for method in METHODS if method != "a8bit"}
QUICK |= {("my_model-8", "nf4"), ("mixing-1", "a8bit"), ("mixing-1", "nf4")}
EVERY = [
    pytest.param(f"{name}-{count}", method, marks=() if (f"{name}-{count}", method) in QUICK else pytest.mark.slow)
    for name in CLASSES
    for count in (1, 8)
    for method in METHODS
]


@pytest.mark.filterwarnings("ignore:'a8bit' is calibrated on a few random tokens:UserWarning")
@pytest.mark.parametrize(("case", "method"), EVERY, indirect=["case"])
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
    near = np.asarray(case.logits(model, input_ids))
    # Rounding a normal weight's groups of up to 64 costs about 0.1 of its norm in 4 bits and 0.01 in 8; rounding
    # activations as much again. Independent errors of three layers in a row add up by their squares: √3 or √6 of that.
    allowed = {"nf4": 0.2, "a4q": 0.3}.get(method, 0.03)
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < allowed
