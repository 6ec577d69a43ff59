"""What quantizing costs the embedded, trained model on text it has not seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import LlamaForCausalLM
from easydel.assets import embedded_model_path, embedded_validation_path

# Rises allowed, in percent; seen: nf4 0.70, 8bit -0.02, a8bit -0.02, a8q -0.02, a4q 13.1 (which is reported only).
RISES = {"nf4": 4.0, "8bit": 0.5, "a8bit": 0.5, "a8q": 1.0}


@jax.jit
def _loss(logits, ids):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
    return -chosen.mean()


def perplexity(model, windows) -> float:
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids).logits)
    return float(np.exp(np.mean([_loss(forward(state, part), part) for part in np.split(windows, 6)])))


@pytest.mark.slow
def test_perplexity_of_the_embedded_model():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path(), model_max_length=10**6)
    ids = np.asarray(tokenizer(embedded_validation_path().read_text())["input_ids"], np.int32)
    windows = ids[: 38 * 256].reshape(38, 256)
    held_out, calibration = windows[:36], [windows[36:]]

    def load():
        return LlamaForCausalLM.from_pretrained(embedded_model_path(), dtype=jnp.float32)

    exact = perplexity(load(), held_out)
    for method, allowed in RISES.items():
        model = load().quantize(method, calibration=calibration if method == "a8bit" else None)
        rise = 100 * (perplexity(model, held_out) / exact - 1)
        assert -1 < rise <= allowed, (method, rise)
