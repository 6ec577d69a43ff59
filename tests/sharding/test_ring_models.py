"""Whole models whose sequences are split: loss and gradients of one device, what is written, and less memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

import easydel
from easydel import LossConfig
from easydel.paths import flatten
from easydel.sharding import create_mesh
from tests.lora.tiny import randomise
from tests.quantization.tiny import llama
from tests.sharding.equality import SMALL, TOLERANCE, relative, subject
from tests.sharding.held import zeros


def split(sp: int, fsdp: int = 1, tp: int = 1) -> jax.sharding.Mesh:
    return create_mesh((1, fsdp, 1, tp, sp), devices=jax.devices()[: fsdp * tp * sp])


def learned(model: Any, inputs: Mapping[str, Any], **options: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the loss and its gradients by path."""
    forward = model.pure_transform_fn()
    run = jax.jit(jax.value_and_grad(lambda params, inputs: forward(params, {**inputs, **options}).loss))
    loss, gradients = run(model.params, dict(inputs))
    return np.asarray(loss), {path: np.asarray(leaf) for path, leaf in flatten(gradients).items()}


def check(got: tuple[np.ndarray, dict[str, np.ndarray]], want: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    assert relative(got[0], want[0]) < TOLERANCE
    largest = max(np.abs(gradient).max() for gradient in want[1].values())
    for path, gradient in want[1].items():
        assert relative(got[1][path], gradient, SMALL * largest) < TOLERANCE, path


# Of 16 tokens, up to 2 on a device; Gemma 2 has windows of 6 and soft-caps, BERT sees in both directions. Two rows are
# padded, and labels are random: none at the border of two devices is like its neighbour.
PAIRS = [("gemma2", 8), ("bert", 2)]
MORE = [
    ("llama", 2),
    ("llama", 4),
    ("llama", 8),
    ("gemma2", 2),
    ("gemma2", 4),
    ("bert", 4),
    ("bert", 8),
    ("t5", 4),
    ("mixtral", 4),
]


@pytest.mark.parametrize(("family", "sp"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
def test_loss_and_gradients_are_those_of_one_device(family: str, sp: int) -> None:
    case = subject(family)
    check(learned(case.build(split(sp)), case.inputs), alone(family))


@functools.cache
def alone(family: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return learned(subject(family).build(), subject(family).inputs)


def everything() -> Any:
    """Return a model in a scan, with rematerialisation and adapters."""
    model = llama(scan_layers=True, gradient_checkpointing="dots", attn_mechanism="auto")
    return randomise(model.apply_lora_to_layers(lora_rank=2))


def test_packed_rows_scan_remat_adapters_and_a_chunked_loss() -> None:
    rng = np.random.default_rng(0)
    one = everything()
    ids = rng.integers(4, one.config.vocab_size, (4, 16)).astype(np.int32)
    segments = np.stack([np.repeat([1, 2, 3], counts) for counts in ((5, 4, 7), (1, 14, 1), (8, 4, 4), (3, 6, 7))])
    labels = np.where(rng.random(ids.shape) < 0.8, ids, -100)
    inputs = {"input_ids": ids, "segment_ids": segments.astype(np.int32), "labels": labels}
    options = {"loss_config": LossConfig(token_chunk_size=5)}
    many = everything().shard_model(mesh=split(2, fsdp=2, tp=2))
    check(learned(many, inputs, **options), learned(one, inputs, **options))


@pytest.mark.parametrize("prompt", [8, 6])
def test_prompts_of_any_length_are_continued(prompt: int) -> None:
    """Eight tokens go round four devices, six do not; what is written one by one never does."""
    case = subject("gemma2")
    ids = case.inputs["input_ids"][:2, :prompt]
    want = case.build().generate(ids, max_new_tokens=5).sequences
    got = case.build(split(4)).generate(ids, max_new_tokens=5).sequences
    np.testing.assert_array_equal(got, want)


def test_insisting_on_a_ring() -> None:
    model = zeros(easydel.LlamaForCausalLM, tiny(attn_mechanism="ring")).shard_model(mesh=split(4))
    ids = np.ones((1, 8), np.int32)
    jax.eval_shape(model.pure_transform_fn(), model.params, {"input_ids": ids})
    with pytest.raises(easydel.UnsupportedError, match="sp=4 does not divide the 6 queries"):
        jax.eval_shape(model.pure_transform_fn(), model.params, {"input_ids": ids[:, :6]})
    empty = model.init_operations_cache(1, 16)
    jax.eval_shape(model.pure_transform_fn(), model.params, {"input_ids": ids, "cache": empty})
    with pytest.raises(easydel.UnsupportedError, match="keys are those of a cache"):
        model.generate(ids, max_new_tokens=2)


def tiny(**fields: Any) -> Any:
    """Return a config of whose step activations take most."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 8192}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return easydel.LlamaConfig(**sizes | heads | fields)


def temporary(sp: int, **fields: Any) -> int:
    """Return the bytes that a step on 8192 tokens takes on each device for a while, by XLA's own account."""
    model = zeros(easydel.LlamaForCausalLM, tiny(**fields)).shard_model(mesh=split(sp))
    forward, ids = model.pure_transform_fn(), jax.ShapeDtypeStruct((1, 8192), np.int32)
    step = jax.jit(jax.value_and_grad(lambda params, inputs: forward(params, inputs).loss))
    compiled = step.lower(model.params, {"input_ids": ids, "labels": ids}).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_long_sequence_takes_each_device_its_part() -> None:
    ring, two, one = (temporary(sp, num_hidden_layers=1) for sp in (8, 2, 1))
    assert ring <= one / 6
    assert ring <= two / 3, "a quarter, and what does not depend on the sequence"


@pytest.mark.parametrize(
    "remat", ["dots", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("none", "full", "dots_no_batch"))]
)
def test_no_scan_keeps_masks_or_products(remat: str) -> None:
    """They would be 2 heads · 1024 queries · 8192 keys: as float32 67 MB of each layer, where 23 MB are all."""
    assert temporary(8, scan_layers=True, gradient_checkpointing=remat) < 30e6
