"""The forward pass of a backbone with an encoder and a decoder, for every family that is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.caching import Cache
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.forward import check_length
from easydel.layers import Embed, LayerInputs
from easydel.layers.linear import normal_init
from easydel.models.inputs import embed_or_take, extras_asked, place_tokens
from easydel.outputs import BaseModelOutput, Seq2SeqModelOutput


class EncoderDecoder(EasyDeLBaseModule):
    """Embeddings that both sides share, the encoder and the decoder.

    A family sets `side_class`, called as `side_class(config, is_decoder, dtype=…, param_dtype=…, precision=…, rngs=…)`.
    A side is called as `side(hidden, positions, inputs, caches) -> StackOutput`, with embedded tokens `[batch, seq,
    hidden]` and their positions `[batch, seq]`; what it returns has been through its final norm.
    """

    side_class: ClassVar[Callable[..., Any]]
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
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": precision}
        self.embed_tokens = self.make_embedding(**options, rngs=rngs)
        make = type(self).side_class
        self.encoder, self.decoder = (make(config, is_decoder, **options, rngs=rngs) for is_decoder in (False, True))

    def make_embedding(self, **options: Any) -> Embed:
        """Make the table of both sides' tokens."""
        deviation = normal_init(self.config.initializer_range)
        return Embed(self.config.vocab_size, self.config.hidden_size, embedding_init=deviation, **options)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids `[batch, seq]` to vectors `[batch, seq, hidden]`."""
        return self.embed_tokens(input_ids)

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence each side can take at all; `None`: any."""
        return None

    def decoder_ids(self, input_ids: jax.Array | None) -> jax.Array | None:
        """Return the decoder's tokens where none are given, `[batch, target]`: none, they must be given."""
        del input_ids
        return None

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        encoder_outputs: Any = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Run the encoder and the decoder; a cache that was used before stands in for the encoder.

        Args:
            input_ids: of the encoder, int32 `[batch, source]`.
            attention_mask: 0 where a token of the encoder is padding, `[batch, source]`.
            decoder_input_ids: int32 `[batch, target]`.
            decoder_attention_mask: 0 where a token of the decoder is padding, `[batch, target]`.
            inputs_embeds: `[batch, source, hidden]`, in place of `input_ids`.
            decoder_inputs_embeds: `[batch, target, hidden]`, in place of `decoder_input_ids`.
            encoder_outputs: what `encode` returned, or the states `[batch, source, hidden]` alone (or first in a
                tuple): no encoder is run.
            cache: of the decoder, from `init_operations_cache`, or an earlier output.
            output_hidden_states: also return the embeddings and each layer's output; `None`: as the config says.
            output_attentions: also return the attention weights; `None`: as the config says.

        Raises:
            ValueError: neither or both of ids and embeddings, shapes that do not fit, or more tokens than positions.
        """
        flags = (output_hidden_states, output_attentions)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.decoder_ids(input_ids)
        if cache is not None and not cache.is_empty:
            encoded = BaseModelOutput()
        elif encoder_outputs is None:
            encoded = self.encode(input_ids, attention_mask, inputs_embeds, *flags)
        elif isinstance(encoder_outputs, BaseModelOutput):
            encoded = encoder_outputs
        else:
            # In a tuple, as transformers gives them, the states come first.
            states = encoder_outputs[0] if isinstance(encoder_outputs, tuple) else encoder_outputs
            encoded = BaseModelOutput(last_hidden_state=jnp.asarray(states).astype(self.dtype))
        decoded = self.decode(
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, encoded, attention_mask, cache, *flags
        )
        return decoded.replace(
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Run the encoder alone; arguments as in the forward pass."""
        with_states, with_attentions = extras_asked(self.config, output_hidden_states, output_attentions)
        hidden = embed_or_take(self.embed, input_ids, inputs_embeds, self.dtype)
        if attention_mask is None:
            check_length(self, hidden.shape[1])
        _, mask, tokens, positions = place_tokens(attention_mask, None, None, *hidden.shape[:2])
        inputs = LayerInputs(
            rotary=None,
            mask=mask,
            tokens=tokens,
            output_attentions=with_attentions,
            output_hidden_states=with_states,
        )
        out = self.encoder(hidden, positions, inputs, None)
        return BaseModelOutput(
            last_hidden_state=out.hidden,
            hidden_states=(*out.inputs, out.hidden) if with_states else None,
            attentions=out.collect("attention") if with_attentions else None,
        )

    def decode(
        self,
        decoder_input_ids: jax.Array | None,
        decoder_attention_mask: jax.Array | None,
        decoder_inputs_embeds: jax.Array | None,
        encoded: BaseModelOutput,
        attention_mask: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Run the decoder alone, on what `encode` returned; the other arguments as in the forward pass."""
        with_states, with_attentions = extras_asked(self.config, output_hidden_states, output_attentions)
        hidden = embed_or_take(self.embed, decoder_input_ids, decoder_inputs_embeds, self.dtype, "decoder_")
        if decoder_attention_mask is None and cache is None:
            check_length(self, hidden.shape[1])
        cache, mask, tokens, positions = place_tokens(decoder_attention_mask, None, cache, *hidden.shape[:2])
        inputs = LayerInputs(
            rotary=None,
            mask=mask,
            tokens=tokens,
            encoded=encoded.last_hidden_state,
            encoded_valid=_source_valid(encoded.last_hidden_state, attention_mask, hidden.shape[0]),
            output_attentions=with_attentions,
            output_hidden_states=with_states,
        )
        out = self.decoder(hidden, positions, inputs, None if cache is None else cache.layers)
        return Seq2SeqModelOutput(
            last_hidden_state=out.hidden,
            cache=None if cache is None else cache.with_layers(out.caches),
            decoder_hidden_states=(*out.inputs, out.hidden) if with_states else None,
            decoder_attentions=out.collect("attention") if with_attentions else None,
            cross_attentions=out.collect("cross_attention") if with_attentions else None,
        )


def _source_valid(states: jax.Array | None, attention_mask: jax.Array | None, batch: int) -> jax.Array | None:
    """Return which of the encoder's states hold a token, bool `[batch, source]`; `None`: all, or a cache knows."""
    if states is None:
        return None
    if states.ndim != 3:
        raise ValueError(f"encoder_outputs must be states [batch, source, hidden], got shape {states.shape}")
    if states.shape[0] != batch:
        raise ValueError(f"the encoder's states have {states.shape[0]} rows, the decoder's input has {batch}")
    if attention_mask is None:
        return None
    mask = jnp.asarray(attention_mask)
    if mask.shape != states.shape[:2]:
        raise ValueError(f"attention_mask of shape {mask.shape} does not fit the encoder's states {states.shape}")
    return mask.astype(bool)
