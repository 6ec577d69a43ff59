"""Logits that nobody has computed: hidden states and the head that would make logits of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from easydel.errors import UnsupportedError
from easydel.loss.config import LossConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias"),
    meta_fields=("transposed", "soft_cap", "precision"),
)
@dataclasses.dataclass(frozen=True)
class UncomputedLogits:
    """Stands for `soft_cap(hidden @ kernel + bias)`, which a chunked loss computes a few tokens at a time.

    Attributes:
        hidden: `[batch, seq, features]`, in the compute dtype.
        kernel: `[features, vocab]`, in the same dtype; `[vocab, features]` if `transposed`.
        bias: `[vocab]` or `None`.
        transposed: whether the kernel is the embedding's table.
        soft_cap: logits `x` become `soft_cap · tanh(x / soft_cap)`; `None`: they stay.
        precision: of the matrix products.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None = None
    transposed: bool = False
    soft_cap: float | None = None
    precision: Any = None

    @property
    def vocab_size(self) -> int:
        """How many logits each token would have."""
        return self.kernel.shape[0 if self.transposed else 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the logits would have, `(batch, seq, vocab)`."""
        return (*self.hidden.shape[:-1], self.vocab_size)


def refuse_chunks(config: LossConfig, logits: Any) -> None:
    """Raise if chunks are asked for of logits that are there already, or the other way round.

    Raises:
        UnsupportedError: `token_chunk_size` with computed logits.
        ValueError: uncomputed logits without it.
    """
    uncomputed = isinstance(logits, UncomputedLogits)
    if uncomputed and config.token_chunk_size is None:
        raise ValueError("logits that are not computed need a LossConfig with token_chunk_size (an integer or 'auto')")
    if not uncomputed and config.token_chunk_size is not None:
        raise UnsupportedError(
            f"token_chunk_size={config.token_chunk_size!r} is not supported for logits that are there already, here "
            f"{list(logits.shape)}: it needs a forward pass of CausalLM, MaskedLM or Seq2SeqLM, which leaves them "
            "uncomputed; leave token_chunk_size out, or give compute_loss the inputs in place of logits"
        )
