"""Layers of several kinds in one model: each keeps what its kind needs, and all run as without a cache."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel.caching import AttentionCache, QuantizedStates, RecurrentCache, SlidingCache
from easydel.layers import Attention, LayerInputs, LayerOutput, RMSNorm, StateSpaceMixer, attention_fields
from easydel.models.decoder import Decoder
from easydel.models.tasks import CausalLM
from tests.models.inputs import pad

KINDS = ("recurrent", "full", "sliding")
WINDOW = 4
CONFIG = easydel.LlamaConfig(
    vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
    initializer_range=0.3, pad_token_id=None, eos_token_id=None,
)  # fmt: skip
MIXER: dict[str, Any] = {
    "state_size": 6, "num_groups": 2, "conv_kernel": 3, "chunk_size": 4, "act": "silu", "use_bias": False,
    "use_conv_bias": True, "epsilon": 1e-5, "time_step_limit": (0.0, 10.0), "time_step_init": (0.01, 0.5, 1e-4),
}  # fmt: skip
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(1, 64, length).astype(np.int32) for length in (12, 7)]


class Block(nnx.Module):
    def __init__(self, config: Any, kind: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        self.norm = RMSNorm(config.hidden_size, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype)
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        if kind == "recurrent":
            self.mixer = StateSpaceMixer(config.hidden_size, 4, 8, **MIXER, **options)
        else:
            window = WINDOW if kind == "sliding" else None
            self.mixer = Attention(**attention_fields(config), window=window, **options)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        out = self.mixer(self.norm(hidden), inputs, cache)
        return out.replace(hidden=hidden + out.hidden)


class Mixed(Decoder):
    block_class = Block

    @staticmethod
    def layer_kinds(config: Any) -> list[str]:
        return list(KINDS)


class MixedLM(CausalLM):
    backbone_class = Mixed
    config_class = easydel.LlamaConfig
    model_task = "causal-lm"


@pytest.fixture(scope="module")
def model() -> MixedLM:
    return MixedLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(model: MixedLM) -> Any:
    return jax.jit(lambda ids, mask=None, cache=None: model(input_ids=ids, attention_mask=mask, cache=cache))


def test_each_layer_keeps_what_its_kind_needs(model: MixedLM) -> None:
    short, long = (model.init_operations_cache(2, length) for length in (40, 400))
    kinds = {"recurrent": RecurrentCache, "full": AttentionCache, "sliding": SlidingCache}
    assert [type(layer) for layer in short.layers] == [kinds[kind] for kind in KINDS]
    sizes, longer = ([sum(x.nbytes for x in jax.tree.leaves(layer)) for layer in c.layers] for c in (short, long))
    place = 2 * 2 * 2 * 8 * 4  # keys and values · rows · heads · head_dim · float32
    recurrent = 2 * (2 * (32 + 2 * 2 * 6) + 4 * 8 * 6) * 4  # rows · (window · channels + state) · float32
    assert sizes == [recurrent, 40 * place, WINDOW * place]
    assert longer == [recurrent, 400 * place, WINDOW * place]


@pytest.mark.parametrize("left", [True, False])
def test_in_parts_as_in_one(model: MixedLM, run: Any, left: bool) -> None:
    """Padding stands before a row, or behind it, so that later chunks hold nothing for it."""
    ids, mask = pad(ROWS, 12, left=left)
    parts, cache = [], model.init_operations_cache(2, 14)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        out = run(ids[:, start:stop], mask[:, start:stop], cache)
        parts, cache = [*parts, np.asarray(out.logits)], out.cache
    for got, kept, row in zip(np.concatenate(parts, axis=1), mask == 1, ROWS, strict=True):
        want = np.asarray(run(row[None]).logits[0])
        np.testing.assert_allclose(got[kept], want, atol=1e-5 * np.abs(want).max())  # the same sums in another order


def test_int8_is_for_keys_and_values(model: MixedLM) -> None:
    layers = model.init_operations_cache(2, 40, dtype="int8").layers
    assert all(isinstance(layer.key, QuantizedStates) for layer in layers[1:])
    assert {array.dtype for array in jax.tree.leaves(layers[0])} == {np.dtype("float32")}


@pytest.mark.slow
def test_padded_prompts_are_continued_as_alone(model: MixedLM) -> None:
    ids, mask = pad(ROWS, 12, left=True)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    together = np.asarray(model.generate(ids, attention_mask=mask, **options).sequences)[:, 12:]
    for row, got in zip(ROWS, together, strict=True):
        alone = np.asarray(model.generate(row[None], **options).sequences)[0, len(row) :]
        np.testing.assert_array_equal(got, alone)
    assert len(np.unique(together)) > 5, "a constant sequence tests nothing"
