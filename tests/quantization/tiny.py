"""Tiny models, and the published formats written down a second time, in numpy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel import LlamaConfig, LlamaForCausalLM

METHODS = ("nf4", "8bit", "a8bit", "a8q", "a4q")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 64, (2, 8)), jnp.int32)
CALIBRATION = (np.random.default_rng(1).integers(1, 64, (2, 16)),)

# As printed in bitsandbytes' sources: the code points, and between them what a value must exceed to get the higher one.
POINTS = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
LIMITS = np.float32([
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
])  # fmt: skip


def groups_of(row: np.ndarray, size: int) -> list[np.ndarray]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def reference_nf4(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return packed codes and absmax of a float32 `[out, in]`, value by value."""
    codes, scales = [], []
    for row in weight:
        nibbles: list[int] = []
        for group in groups_of(row, size):
            largest = np.abs(group).max()
            scales.append(largest)
            for value in group:
                scaled = np.float32(0) if largest == 0 else np.float32(value) / largest
                nibbles.append(int((scaled > LIMITS).sum()))
        nibbles += [7] * (len(nibbles) % 2)
        codes.append([high * 16 + low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return np.uint8(codes), np.float32(scales).reshape(len(weight), -1)


def llama(**changes: Any) -> LlamaForCausalLM:
    """Return a model nobody else holds."""
    return nnx.clone(_llama(tuple(sorted(changes.items()))))


@functools.cache
def _llama(changes: tuple[tuple[str, Any], ...]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **dict(changes)}), rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, inputs: Any) -> Any:
    return nnx.merge(graphdef, state)(**inputs)


def logits(model: Any, input_ids: Any = IDS, **inputs: Any) -> np.ndarray:
    """Run a model compiled; equal ones share the program."""
    outputs = _forward(*nnx.split(model), {"input_ids": input_ids, **inputs})
    return np.asarray(getattr(outputs, "logits", outputs))


def quantize(model: Any, method: str, **options: Any) -> Any:
    """Quantize, calibrating where that is needed."""
    if method == "a8bit":
        options.setdefault("calibration", CALIBRATION)
    return model.quantize(method, **options)


def held(model: Any) -> dict[str, np.ndarray]:
    """Return every array of a model by path."""
    from easydel.paths import named_variables

    return {path: np.asarray(v.get_value()) for path, v in named_variables(model, by_layer=False).items()}


def assert_unharmed(model: Any, before: dict[str, np.ndarray]) -> None:
    after = held(model)
    assert after.keys() == before.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=path)
