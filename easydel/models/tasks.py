"""Task heads on any backbone."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import Cache
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.layers.linear import Linear, normal_init
from easydel.outputs import CausalLMOutput, SequenceClassifierOutput


class TaskModule(EasyDeLBaseModule):
    """A backbone and a head.

    A family's class sets `backbone_class`; the backbone is held under `base_model_prefix`, as in transformers.
    """

    backbone_class: ClassVar[type[EasyDeLBaseModule]]
    base_model_prefix: ClassVar[str] = "model"

    def __init__(
        self,
        config: Any,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(config, dtype, param_dtype, precision, rngs)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        backbone = self.backbone_class(config, dtype, param_dtype, precision, rngs)
        setattr(self, self.base_model_prefix, backbone)
        self._add_head(rngs)

    def _add_head(self, rngs: nnx.Rngs) -> None:
        raise TypeError(f"{type(self).__name__} must define _add_head")

    @property
    def backbone(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix)

    def _linear(self, features_out: int, rngs: nnx.Rngs, use_bias: bool = False) -> Linear:
        return Linear(
            self.config.hidden_size,
            features_out,
            use_bias=use_bias,
            kernel_init=normal_init(self.config.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=rngs,
        )


class CausalLM(TaskModule):
    """Predicts the next token: `lm_head` on the backbone, or the embedding itself if `tie_word_embeddings`."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head = self._linear(self.config.vocab_size, rngs)

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[..., hidden]` to logits `[..., vocab]`."""
        if self.config.tie_word_embeddings:
            return self.backbone.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: head → embedding."""
        if not self.config.tie_word_embeddings:
            return {}
        return {"lm_head.weight": f"{self.base_model_prefix}.embed_tokens.weight"}

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        labels: jax.Array | None = None,
        loss_config: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutput:
        """Run the model.

        Arguments are the backbone's, and `labels` int32 `[batch, seq]`, the tokens themselves (-100 masks one), which
        give `.loss` as a `LossConfig` in `loss_config` says.
        """
        out = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            cache=cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return CausalLMOutput(
            logits=self.compute_logits(out.last_hidden_state),
            cache=out.cache,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def next_token_logits(self, input_ids: jax.Array, attention_mask: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the logits of the last position only, `[batch, vocab]`, and the updated cache."""
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, cache=cache)
        return self.compute_logits(out.last_hidden_state[:, -1]), out.cache


class SequenceClassifier(TaskModule):
    """Scores a whole sequence by the hidden state of its last token."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        self.score = self._linear(self.config.num_labels, rngs)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        labels: jax.Array | None = None,
        loss_config: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Run the model.

        Arguments are the backbone's, and `labels`, `[batch]` classes or targets or `[batch, labels]`, which give
        `.loss` as a `LossConfig` in `loss_config` says. The logits, `[batch, labels]`, are those of each row's last
        token: the last that is not `pad_token_id`, or without one, the last that the attention mask keeps.
        """
        out = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            cache=cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = out.last_hidden_state
        last = self._last_token(input_ids, attention_mask, *hidden.shape[:2])
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return SequenceClassifierOutput(
            logits=self.score(pooled), cache=out.cache, hidden_states=out.hidden_states, attentions=out.attentions
        )

    def _last_token(self, input_ids: Any, attention_mask: Any, batch: int, length: int) -> jax.Array:
        if input_ids is not None and self.config.pad_token_id is not None:
            kept = jnp.asarray(input_ids) != self.config.pad_token_id
        elif attention_mask is not None:
            kept = jnp.asarray(attention_mask)[:, -length:].astype(bool)
        else:
            return jnp.full((batch,), length - 1, jnp.int32)
        return jnp.max(jnp.where(kept, jnp.arange(length, dtype=jnp.int32), 0), axis=1)
