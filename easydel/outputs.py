"""What a forward pass returns: dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, dataclass_transform

import jax
import jax.numpy as jnp


@dataclass_transform(field_specifiers=(dataclasses.field,))
def _pytree(cls: type) -> type:
    cls = dataclasses.dataclass(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
class ModelOutput:
    """Base of all outputs: attributes, `output["name"]`, and iteration over the names of what is set."""

    def keys(self) -> list[str]:
        """Return the names of the fields that are set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{type(self).__name__} holds no {name!r}; it holds {', '.join(self.keys())}")
        return getattr(self, name)

    def __iter__(self) -> Any:
        return iter(self.keys())

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@_pytree
class BaseModelOutput(ModelOutput):
    """Output of a backbone.

    Attributes:
        last_hidden_state: `[batch, seq, hidden]`, after the final norm.
        cache: the updated cache, if one was given.
        hidden_states: if asked for: the embeddings, each layer's output, the last one after the final norm.
        attentions: if asked for: per layer the weights, `[batch, heads, query, key]`.
        router_logits: of models with experts: per layer what the router says, `[batch, seq, experts]`.
        pooler_output: of encoders with a pooler: one vector for each row, `[batch, hidden]`.
    """

    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    router_logits: tuple[jax.Array, ...] | None = None
    pooler_output: jax.Array | None = None

    def carried(self) -> dict[str, Any]:
        """Return what a head passes on as it is."""
        return {name: self[name] for name in self.keys() if name not in ("last_hidden_state", "pooler_output")}


@_pytree
class Seq2SeqModelOutput(ModelOutput):
    """Output of a backbone with an encoder and a decoder.

    Attributes:
        last_hidden_state: of the decoder, `[batch, target, hidden]`, after the final norm.
        cache: the decoder's updated cache, if one was given.
        encoder_last_hidden_state: `[batch, source, hidden]`; `None` where a cache stood in for the encoder.
        encoder_hidden_states: as `BaseModelOutput.hidden_states`, of the encoder.
        decoder_hidden_states: likewise, of the decoder.
        encoder_attentions: as `BaseModelOutput.attentions`, of the encoder.
        decoder_attentions: likewise, of the decoder to itself.
        cross_attentions: likewise, of the decoder to the encoder: `[batch, heads, target, source]`.
    """

    last_hidden_state: jax.Array | None = None
    cache: Any = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None

    def carried(self) -> dict[str, Any]:
        """Return what a head passes on as it is."""
        return {name: self[name] for name in self.keys() if name != "last_hidden_state"}


@_pytree
class Seq2SeqLMOutput(ModelOutput):
    """Output of a language model with an encoder: `logits` `[batch, target, vocab]`, `loss` float32 `[]`.

    The rest is as in `Seq2SeqModelOutput`.
    """

    logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    uncomputed_logits: Any = None


@_pytree
class CausalLMOutput(ModelOutput):
    """Output of a language model: `logits` `[batch, seq, vocab]` in the compute dtype, `loss` float32 `[]`.

    `uncomputed_logits`, an `easydel.loss.UncomputedLogits`, stands for logits where a `LossConfig` has chunks and there
    are no labels yet; so in the other language models' outputs.
    """

    logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    router_logits: tuple[jax.Array, ...] | None = None
    auxiliary_loss: jax.Array | None = None
    router_z_loss: jax.Array | None = None
    uncomputed_logits: Any = None


@_pytree
class SequenceClassifierOutput(ModelOutput):
    """Output of a sequence classifier: `logits` `[batch, labels]` in the compute dtype, `loss` float32 `[]`."""

    logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    router_logits: tuple[jax.Array, ...] | None = None


@_pytree
class TokenClassifierOutput(ModelOutput):
    """Output of a token classifier: `logits` `[batch, seq, labels]` in the compute dtype, `loss` float32 `[]`."""

    logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@_pytree
class MaskedLMOutput(ModelOutput):
    """Output of a masked language model: `logits` `[batch, seq, vocab]` in the compute dtype, `loss` float32 `[]`."""

    logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    uncomputed_logits: Any = None


@_pytree
class QuestionAnsweringOutput(ModelOutput):
    """Output of a question answerer: `start_logits`, `end_logits` `[batch, seq]`, `loss` float32 `[]`."""

    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    loss: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None

    @property
    def logits(self) -> jax.Array:
        """Both as one array `[batch, seq, 2]`, as the loss takes them."""
        return jnp.stack([jnp.asarray(self.start_logits), jnp.asarray(self.end_logits)], axis=-1)


@_pytree
class Seq2SeqStates(ModelOutput):
    """What outputs of heads on an encoder and a decoder have besides; as in `Seq2SeqModelOutput`."""

    cache: Any = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None


@_pytree
class Seq2SeqSequenceClassifierOutput(Seq2SeqStates):
    """Output of a sequence classifier with an encoder: `logits` `[batch, labels]`, `loss` float32 `[]`."""

    logits: jax.Array | None = None
    loss: jax.Array | None = None


@_pytree
class Seq2SeqQuestionAnsweringOutput(Seq2SeqStates):
    """Output of a question answerer with an encoder: `start_logits`, `end_logits` `[batch, seq]`, `loss`."""

    start_logits: jax.Array | None = None
    end_logits: jax.Array | None = None
    loss: jax.Array | None = None

    @property
    def logits(self) -> jax.Array:
        """Both as one array `[batch, seq, 2]`, as the loss takes them."""
        return jnp.stack([jnp.asarray(self.start_logits), jnp.asarray(self.end_logits)], axis=-1)


@_pytree
class EmbeddingOutput(ModelOutput):
    """Output of an embedding model: `embeddings` `[batch, hidden]`, and `last_hidden_state` `[batch, seq, hidden]`."""

    embeddings: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@_pytree
class GenerationOutput(ModelOutput):
    """Output of `generate`: `sequences` int32 `[batch, prompt + new]`, padded after the end-of-text token.

    Of a model with an encoder, the decoder's: its prompt is the start token, unless it was given another. Where there
    are several answers to a prompt, they follow one another.

    Attributes:
        sequences: int32 `[batch · num_return_sequences, prompt + new]`.
        scores: if `output_scores`: for each step what its tokens were chosen from, processed, float32 `[rows, vocab]`;
            rows are those of `sequences`, of beam search `[batch · num_beams]`.
        logits: if `output_logits`: for each step what the model said, likewise.
        sequences_scores: of beam search: float32 `[batch · num_return_sequences]`, lengths taken into account.
        beam_indices: of beam search: int32 `[batch · num_return_sequences, new]`, the row of `scores` in which each
            token was chosen, -1 after the end.
    """

    sequences: jax.Array | None = None
    scores: tuple[jax.Array, ...] | None = None
    logits: tuple[jax.Array, ...] | None = None
    sequences_scores: jax.Array | None = None
    beam_indices: jax.Array | None = None
