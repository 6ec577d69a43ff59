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
    decoder_has_bias: ClassVar[bool] = True
    """Whether a `decoder` of its own has a bias; then nothing reads `vocab_bias`, but transformers' files hold it."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        act, epsilon = self.transform_settings()
        self.transform = self._linear(config.hidden_size, rngs, use_bias=True, roles=("mlp", None))
        self.transform_norm = layer_norm(config.hidden_size, epsilon, dtype=self.dtype, param_dtype=self.param_dtype)
        self.act = activation(act)
        self.vocab_bias = nnx.Param(jnp.zeros((config.vocab_size,), self.param_dtype))
        if not config.tie_word_embeddings:
            use_bias = self.decoder_has_bias
            self.decoder = self._linear(config.vocab_size, rngs, use_bias=use_bias, roles=(None, "vocab"))

    def transform_settings(self) -> tuple[str, float]:
        """Return the transform's activation and the epsilon of its norm."""
        return self.config.hidden_act, self.config.layer_norm_eps

    def head_layer(self) -> Any:
        """Return the embedding, or the `decoder` where the head is not tied."""
        return self.base_model.embed_tokens if self.config.tie_word_embeddings else self.decoder

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Transform hidden states `[..., hidden]`."""
        return self.transform_norm(self.act(self.transform(hidden)))

    def head_bias(self) -> jax.Array | None:
        """Return the bias beside the embedding; a `decoder` has its own."""
        has_own = self.decoder_has_bias and not self.config.tie_word_embeddings
        return None if has_own else self.vocab_bias.get_value()
