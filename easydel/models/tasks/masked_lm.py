"""Language models that fill in masked tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.layers import activation, layer_norm
from easydel.models.tasks.vocabulary import VocabularyTask
from easydel.outputs import MaskedLMOutput


class MaskedLM(VocabularyTask):
    """Predicts each token itself: a transform, then the embedding (or a `decoder` of its own) and a bias.

    `labels` are the tokens, int32 `[batch, seq]`; -100 where nothing is to be predicted.
    """

    can_generate: ClassVar[bool] = False
    output_class = MaskedLMOutput

    def _add_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        self.transform = self._linear(config.hidden_size, rngs, use_bias=True, roles=("mlp", None))
        self.transform_norm = layer_norm(
            config.hidden_size, config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.act = activation(config.hidden_act)
        # With a decoder of its own nothing reads this bias, but transformers' files hold it all the same.
        self.vocab_bias = nnx.Param(jnp.zeros((config.vocab_size,), self.param_dtype))
        if not config.tie_word_embeddings:
            self.decoder = self._linear(config.vocab_size, rngs, use_bias=True, roles=(None, "vocab"))

    def head_layer(self) -> Any:
        """Return the embedding, or the `decoder` where the head is not tied."""
        return self.base_model.embed_tokens if self.config.tie_word_embeddings else self.decoder

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Transform hidden states `[..., hidden]`."""
        return self.transform_norm(self.act(self.transform(hidden)))

    def head_bias(self) -> jax.Array | None:
        """Return the bias beside the embedding; a `decoder` has its own."""
        return self.vocab_bias.get_value() if self.config.tie_word_embeddings else None
