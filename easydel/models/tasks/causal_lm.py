"""Language models that predict the next token."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import Cache
from easydel.hub.weight_map import WeightRule
from easydel.models.tasks.vocabulary import VocabularyTask


class CausalLM(VocabularyTask):
    """Predicts the next token: `lm_head` on the backbone, or the embedding itself if `tie_word_embeddings`.

    `labels` are the tokens themselves, int32 `[batch, seq]`; -100 masks one.
    """

    tied_weight: ClassVar[str] = "embed_tokens.weight"
    """The embedding's name in checkpoints of the backbone."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head = self._linear(self.config.vocab_size, rngs, roles=(None, "vocab"))

    def next_token_logits(self, input_ids: jax.Array, attention_mask: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the logits of the last position only, `[batch, vocab]`, and the updated cache."""
        out = self.base_model(input_ids=input_ids, attention_mask=attention_mask, cache=cache)
        return self.compute_logits(out.last_hidden_state[:, -1]), out.cache

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: head → embedding."""
        if not self.config.tie_word_embeddings:
            return {}
        return {"lm_head.weight": f"{self.base_model_prefix}.{self.tied_weight}"}


class BiasedCausalLM(CausalLM):
    """A `CausalLM` whose head has a bias, also where it is tied to the embedding."""

    weight_map: ClassVar[tuple[WeightRule, ...]] = (WeightRule("lm_head.bias", "vocab_bias"),)

    def _add_head(self, rngs: nnx.Rngs) -> None:
        super()._add_head(rngs)
        self.vocab_bias = nnx.Param(jnp.zeros((self.config.vocab_size,), self.param_dtype))

    def head_bias(self) -> jax.Array:
        """Return the bias of the head, `[vocab]`."""
        return self.vocab_bias.get_value()
