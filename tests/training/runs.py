"""Small runs that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.training import Trainer, TrainingArguments

VOCAB, LENGTH, ROWS = 32, 12, 8
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, attention_dropout=0.1,
)  # fmt: skip


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES | fields), rngs=nnx.Rngs(0))


def batch_of(index: int) -> dict[str, np.ndarray]:
    """Rows that count upwards, some of their labels masked: learnt in a few steps."""
    random = np.random.default_rng(index)
    ids = ((random.integers(0, VOCAB, (ROWS, 1)) + np.arange(LENGTH)) % VOCAB).astype(np.int32)
    labels = np.where(random.random(ids.shape) < 0.2, -100, ids).astype(np.int32)
    return {"input_ids": ids, "labels": labels}


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    usual = dict(
        max_steps=8, learning_rate=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01, save_steps=3,
        log_steps=1, log_to=("jsonl",), save_model=False,
    )  # fmt: skip
    return TrainingArguments(str(folder), **usual | fields)


def trainer(folder: Path, model: Any = None, data: Any = batch_of, eval_data: Any = None, **fields: Any) -> Trainer:
    callbacks = fields.pop("callbacks", ())
    made = tiny_llama() if model is None else model
    return Trainer(made, arguments(folder, **fields), data, eval_data, callbacks=callbacks)


def bits(tree: Any) -> list[bytes]:
    """The arrays of a tree as bytes, to be compared bit by bit."""
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def numbers(state: Any) -> list[bytes]:
    return bits((state.step, state.params, state.opt_state))
