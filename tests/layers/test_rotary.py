"""Rotary embeddings: frequencies of every type against transformers', rotation against its definition."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import easydel
from easydel.layers.rotary import RotaryEmbedding, rotate

DIM, LONGEST = 16, 64
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "short_factor": np.linspace(1, 2, 8).tolist(),
    "long_factor": np.linspace(1, 9, 8).tolist(),
    "original_max_position_embeddings": 16,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = [
    ("linear", {"factor": 3.0}),
    ("linear", {"factor": 3.0, "partial_rotary_factor": 0.5}),
    ("dynamic", {"factor": 2.0}),
    ("yarn", YARN),
    ("yarn", YARN | {"factor": 0.5}),
    ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    ("yarn", YARN | {"mscale": 0.7}),
    ("yarn", YARN | {"attention_factor": 1.5}),
    ("yarn", YARN | {"truncate": False}),
    ("yarn", YARN | {"beta_fast": 4.0, "beta_slow": 0.5}),
    ("yarn", YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}),
    ("yarn", YARN | {"partial_rotary_factor": 0.5}),
    ("longrope", LONG),
    ("longrope", LONG | {"factor": 6.0}),
    ("longrope", LONG | {"factor": 0.5}),
    ("longrope", LONG | {"attention_factor": 1.5}),
    ("llama3", LLAMA3),
    ("llama3", LLAMA3 | {"partial_rotary_factor": 0.5}),
]


def make(kind: str, parameters: dict[str, Any]) -> tuple[RotaryEmbedding, transformers.LlamaConfig]:
    rope = {"rope_type": kind, "rope_theta": 1000.0, **parameters}
    config = transformers.LlamaConfig(
        head_dim=DIM, hidden_size=2 * DIM, num_attention_heads=2, max_position_embeddings=LONGEST, rope_parameters=rope
    )
    return RotaryEmbedding(config.rope_parameters, head_dim=DIM, max_position_embeddings=LONGEST), config


@pytest.mark.parametrize(("kind", "parameters"), CASES)
@pytest.mark.parametrize("length", [8, 100])
def test_frequencies(kind: str, parameters: dict[str, Any], length: int) -> None:
    rotary, config = make(kind, parameters)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    positions = np.arange(length, dtype=np.int32)[None]
    angles = np.arange(length)[:, None] * frequencies.double().numpy()
    for got, function in zip(rotary(positions, np.float32), (np.cos, np.sin), strict=True):
        want = np.concatenate([function(angles)] * 2, axis=-1)[None] * scaling
        np.testing.assert_allclose(got, want, atol=2e-5)  # float32 angles up to 100 are good to about 1e-5


def test_default_frequencies() -> None:
    rotary, _ = make("default", {})
    angles = np.arange(50)[:, None] / 1000.0 ** (np.arange(0, DIM, 2) / DIM)
    np.testing.assert_allclose(
        rotary(np.arange(50, dtype=np.int32)[None], np.float32)[0][0, :, : DIM // 2], np.cos(angles), atol=2e-5
    )


def test_rotation_turns_pairs_by_their_angle() -> None:
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(2, 3, 4, 12)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    twice = np.concatenate([angles, angles], axis=-1)
    got = np.asarray(rotate(x, np.cos(twice), np.sin(twice)))
    numbers = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(got[..., :8], np.concatenate([numbers.real, numbers.imag], axis=-1), atol=1e-5)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])

    got = np.asarray(rotate(x, np.cos(twice), np.sin(twice), interleaved=True))
    numbers = (x[..., 0:8:2] + 1j * x[..., 1:8:2]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(got[..., 0:8:2] + 1j * got[..., 1:8:2], numbers, atol=1e-5)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_heads_keep_their_dtype_when_they_are_rotated_in_float32() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 8)), jnp.bfloat16)
    cos, sin = rng.normal(size=(2, 1, 3, 8)).astype(np.float32)
    got = rotate(x, cos, sin)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_settings_are_checked() -> None:
    with pytest.raises(easydel.UnsupportedError, match="'spiral' is not supported"):
        RotaryEmbedding({"rope_type": "spiral", "rope_theta": 1e4}, head_dim=8, max_position_embeddings=8)
    with pytest.raises(ValueError, match="rope_theta"):
        RotaryEmbedding({"rope_type": "default"}, head_dim=8, max_position_embeddings=8)
    with pytest.raises(ValueError, match="factor"):
        RotaryEmbedding({"rope_type": "linear", "rope_theta": 1e4}, head_dim=8, max_position_embeddings=8)
    with pytest.raises(ValueError, match="needs 8 numbers, got 4"):
        make("longrope", LONG | {"short_factor": [1.0] * 4})[0]


def test_equality_covers_every_setting() -> None:
    one, _ = make("yarn", YARN)
    assert one == make("yarn", YARN)[0]
    assert hash(one) == hash(make("yarn", YARN)[0])
    assert one != make("yarn", YARN | {"factor": 5.0})[0]
    assert one != RotaryEmbedding(dict(one.settings), head_dim=8, max_position_embeddings=LONGEST)
