"""Classifiers."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.hub.weight_map import WeightRule
from easydel.layers import activation, make_dropout
from easydel.models.encoder import first_token
from easydel.models.tasks.base import TaskModule
from easydel.outputs import ModelOutput, SequenceClassifierOutput, TokenClassifierOutput


class SequenceClassifier(TaskModule):
    """Scores a whole sequence by the hidden state of its last token.

    That is the last that is not `pad_token_id`, or without one, the last that the attention mask keeps. `labels` are
    `[batch]` classes or targets, or `[batch, labels]`.
    """

    can_generate: ClassVar[bool] = False

    def _add_head(self, rngs: nnx.Rngs) -> None:
        self.score = self._linear(self.config.num_labels, rngs)

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> SequenceClassifierOutput:
        """Turn the backbone's output into logits `[batch, labels]`."""
        hidden = out.last_hidden_state
        last = self._last_token(input_ids, attention_mask, *hidden.shape[:2])
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return SequenceClassifierOutput(logits=self.score(pooled), **out.carried())

    def _last_token(self, input_ids: Any, attention_mask: Any, batch: int, length: int) -> jax.Array:
        if input_ids is not None and self.config.pad_token_id is not None:
            kept = jnp.asarray(input_ids) != self.config.pad_token_id
        elif attention_mask is not None:
            kept = jnp.asarray(attention_mask)[:, -length:].astype(bool)
        else:
            return jnp.full((batch,), length - 1, jnp.int32)
        return jnp.max(jnp.where(kept, jnp.arange(length, dtype=jnp.int32), 0), axis=1)


class Classifier(TaskModule):
    """A task whose last layer is `classifier`, behind dropout at the rate `head_dropout`."""

    can_generate: ClassVar[bool] = False

    def _add_head(self, rngs: nnx.Rngs) -> None:
        self.dropout = make_dropout(self.head_dropout, rngs)
        self.classifier = self._linear(self.config.num_labels, rngs, use_bias=True)

    @property
    def head_dropout(self) -> float:
        """The rate of dropout before the classifier."""
        return classifier_dropout(self.config)


class PooledClassifier(Classifier):
    """Scores a whole sequence by the backbone's `pooler_output`, with dropout before the classifier.

    `labels` are `[batch]` classes or targets, or `[batch, labels]`.
    """

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> SequenceClassifierOutput:
        """Turn the backbone's output into logits `[batch, labels]`."""
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(out.pooler_output)), **out.carried())


class FirstTokenClassifier(Classifier):
    """Scores a whole sequence by its first token, the first that is not padding, through a layer `dense` and `act`.

    `labels` are `[batch]` classes or targets, or `[batch, labels]`.
    """

    output_class: ClassVar[type[Any]] = SequenceClassifierOutput
    act: ClassVar[str] = "tanh"
    drops_inputs: ClassVar[bool] = True
    """Whether there is dropout before `dense` as well."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        self.dense = self._linear(self.config.hidden_size, rngs, use_bias=True, roles=("mlp", None))
        super()._add_head(rngs)

    def pick(self, hidden: jax.Array, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> jax.Array:
        """Return the vector that stands for each row, `[batch, hidden]`."""
        del input_ids
        return first_token(hidden, None if attention_mask is None else jnp.asarray(attention_mask).astype(bool))

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> ModelOutput:
        """Turn the backbone's output into logits `[batch, labels]`."""
        hidden = self.pick(out.last_hidden_state, input_ids, attention_mask)
        hidden = self.dropout(hidden) if self.drops_inputs else hidden
        hidden = self.dropout(activation(self.act)(self.dense(hidden)))
        return self.output_class(logits=self.classifier(hidden), **out.carried())


class TokenClassifier(Classifier):
    """Scores every token, with dropout before the classifier; on encoders and decoders alike.

    `labels` are classes, int32 `[batch, seq]`; -100 masks one.
    """

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Map the backbone's hidden states `[batch, seq, hidden]` to what goes on: they stay."""
        return hidden

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> TokenClassifierOutput:
        """Turn the backbone's output into logits `[batch, seq, labels]`."""
        hidden = self.dropout(self.head_input(out.last_hidden_state))
        return TokenClassifierOutput(logits=self.classifier(hidden), **out.carried())


class DecoderTokenClassifier(TokenClassifier):
    """A `TokenClassifier` whose classifier transformers calls `score`, as on most decoders."""

    weight_map: ClassVar[tuple[WeightRule, ...]] = (WeightRule("score", "classifier", None),)


def classifier_dropout(config: Any) -> float:
    """Return the rate of dropout before a classifier: the config's own for it, else the one of hidden states.

    The fields and their order, and 0.1 where there is none, are those of transformers' classifiers.
    """
    names = ("classifier_dropout", "hidden_dropout", "hidden_dropout_prob")
    rates = (getattr(config, name, None) for name in names)
    return next((float(rate) for rate in rates if rate is not None), 0.1)
