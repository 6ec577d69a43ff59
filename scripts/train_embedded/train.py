"""The training run: AdamW with warmup and a final fall, checkpoints from which it is taken up again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.infra.base_state import EasyDeLState
from easydel.training import Trainer, TrainingArguments, WindowedText
from easydel.training.data import Batch
from scripts.train_embedded.corpus import Document
from scripts.train_embedded.tokenizer import BEGIN, END

CONTEXT = 512


@dataclass(frozen=True)
class Recipe:
    """What is trained how; the tokens of a step stay the same when the windows grow."""

    steps: int = 4500
    tokens_per_step: int = 1024
    length: int = 256
    long_length: int = CONTEXT
    long_share: float = 0.1
    peak_rate: float = 2e-3
    warmup_steps: int = 300
    falling_share: float = 0.3
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; norms are not decayed.

        The rate stays constant until the last part of the run and then falls to nothing, so that a run may be made
        longer or shorter until that part begins.
        """
        falling = int(self.steps * self.falling_share)
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak_rate, self.warmup_steps),
                optax.constant_schedule(self.peak_rate),
                optax.linear_schedule(self.peak_rate, 0.0, falling),
            ],
            [self.warmup_steps, self.steps - falling],
        )
        adamw = optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.1, mask=_is_matrix)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def model_config(vocab_size: int) -> LlamaConfig:
    """Return the shape of the embedded model: 4.1 M parameters, 8.3 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=224, intermediate_size=576, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, dtype="bfloat16",
    )  # fmt: skip


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda array: array.ndim > 1, params)


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Return the tokens of all documents in one row, `<|end|>` after each."""
    end = tokenizer.token_to_id(END)
    pieces = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return np.concatenate([np.array([*piece.ids, end], np.int32) for piece in pieces])


@dataclass
class Run:
    """A training run in a folder; `seconds` is the time spent in it, over all its parts."""

    recipe: Recipe
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    folder: Path
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Cut the texts into windows."""
        self.short = self.windows(self.train, self.recipe.length)
        self.long = self.windows(self.train, self.recipe.long_length)
        self.held_out = self.windows(self.validation, self.recipe.length)

    def windows(self, tokens: np.ndarray, length: int) -> WindowedText:
        """Cut tokens into windows that start with `<|begin|>`."""
        begin = self.tokenizer.token_to_id(BEGIN)
        if begin is None:
            raise ValueError(f"the tokenizer lacks {BEGIN}; make it with train_tokenizer")
        return WindowedText(tokens, length, begin)

    def batch_of(self, step: int) -> Batch:
        """Return the batch of a step; the last ones have the full context."""
        text = self.short if step < self.recipe.steps * (1 - self.recipe.long_share) else self.long
        return text.train_batch(step, self.recipe.tokens_per_step // text.length, self.recipe.seed)

    def go(self, every: int = 250) -> EasyDeLState:
        """Train to the end, taking up what the folder holds; each `every` steps measure, report and save."""
        config = model_config(self.tokenizer.get_vocab_size())
        arguments = TrainingArguments(
            str(self.folder), max_steps=self.recipe.steps, schedule="constant", log_steps=25, eval_steps=every,
            save_steps=every, save_model=False, log_to=("console", "jsonl"),
        )  # fmt: skip
        result = Trainer(
            LlamaForCausalLM(config, rngs=nnx.Rngs(self.recipe.seed)),
            arguments,
            self.batch_of,
            lambda: self.held_out.eval_batches(8, limit=64),
            optimizer=self.recipe.optimizer(),
            keep_model=False,
        ).train()
        self.seconds = result.progress.seconds
        return result.state
