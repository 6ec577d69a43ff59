"""Language models that fill in masked tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.layers import activation, layer_norm
from easydel.models.tasks.base import TaskModule
from easydel.outputs import MaskedLMOutput


class MaskedLM(TaskModule):
    """Predicts each token itself: a transform, then the embedding (or a `decoder` of its own) and a bias.

    `labels` are the tokens, int32 `[batch, seq]`; -100 where nothing is to be predicted.
    """

    can_generate: ClassVar[bool] = False

    def _add_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.transform = self._linear(config.hidden_size, rngs, use_bias=True)
        self.transform_norm = layer_norm(
            config.hidden_size, config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.act = activation(config.hidden_act)
        # With a decoder of its own nothing reads this bias, but transformers' files hold it all the same.
        self.vocab_bias = nnx.Param(jnp.zeros((config.vocab_size,), self.param_dtype))
        if not config.tie_word_embeddings:
            self.decoder = self._linear(config.vocab_size, rngs, use_bias=True)

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[..., hidden]` to logits `[..., vocab]`."""
        hidden = self.transform_norm(self.act(self.transform(hidden)))
        if not self.config.tie_word_embeddings:
            return self.decoder(hidden)
        return self.base_model.embed_tokens.attend(hidden) + self.vocab_bias.get_value().astype(self.dtype)

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> MaskedLMOutput:
        """Turn the backbone's output into logits `[batch, seq, vocab]`."""
        return MaskedLMOutput(logits=self.compute_logits(out.last_hidden_state), **out.carried())
