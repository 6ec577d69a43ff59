"""The forward pass of a bidirectional encoder backbone, for every family that is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.forward import check_length
from easydel.layers import Embed, LayerInputs, make_layers
from easydel.layers.linear import Spread, normal_init
from easydel.models.inputs import embed_or_take, extras_asked, place_tokens
from easydel.outputs import BaseModelOutput
from easydel.sharding import PartitionRules


class Encoder(EasyDeLBaseModule):
    """Embeddings and a stack of blocks in which every token sees every other; it keeps no cache.

    A family sets `block_class`, called as `block_class(config, kind, dtype=…, param_dtype=…, precision=…, rngs=…)` for
    each of `layer_kinds(config)`, and overrides what else is its own: `layer_kinds`, `count`, `place`, `make_rotary`,
    `finish`, `pool`.
    """

    block_class: ClassVar[Callable[..., nnx.Module]]
    base_model_prefix: ClassVar[str] = "model"
    harmless_extras: ClassVar[tuple[str, ...]] = ()
    can_generate: ClassVar[bool] = False
    has_types: ClassVar[bool] = False
    """Whether tokens have types (`token_type_ids`)."""

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
        self.embed_tokens = self.table(config.vocab_size, rngs, rows="vocab", padding_idx=config.pad_token_id)
        make = type(self).block_class
        self.layers = make_layers(
            lambda kind: make(config, kind, precision=precision, rngs=rngs, **self.dtypes),
            self.layer_kinds(config),
            rngs,
            scan=config.scan_layers,
        )
        self.rotary = self.make_rotary()

    @property
    def dtypes(self) -> dict[str, Any]:
        """The arguments `dtype` and `param_dtype` of layers."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @staticmethod
    def layer_kinds(config: Any) -> list[Any]:
        """Return what tells each layer from the others: here nothing."""
        return ["full_attention"] * config.num_hidden_layers

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence the model can take, one position for each token; `None`: any."""
        return self.config.max_position_embeddings

    @property
    def table_stddev(self) -> Spread:
        """The deviation of new tables, or what draws them."""
        return self.config.initializer_range

    def make_rotary(self) -> Any:
        """Make the rotary positions of all layers: none, where positions are learned."""
        return None

    def table(self, size: int, rngs: nnx.Rngs, rows: str | None = None, padding_idx: int | None = None) -> Embed:
        """Make a table of `size` vectors; `rows` and `padding_idx` as in `Embed`."""
        return Embed(
            size,
            self.config.hidden_size,
            embedding_init=normal_init(self.table_stddev),
            precision=self.precision,
            rows=rows,
            padding_idx=padding_idx,
            rngs=rngs,
            **self.dtypes,
        )

    def count(
        self,
        positions: jax.Array,
        tokens: jax.Array | None,
        input_ids: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Return the positions `[batch, seq]` where none are given.

        Args:
            positions: int32 `[batch, seq]`, the running count of tokens.
            tokens: bool `[batch, seq]`, which places hold a token; `None`: all.
            input_ids: int32 `[batch, seq]`, if given.
            segment_ids: int32 `[batch, seq]`, if given.
        """
        del input_ids, segment_ids
        return positions if tokens is None else _counted_on(positions, tokens, self.longest_sequence)

    def place(self, hidden: jax.Array, positions: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Give embedded tokens `[batch, seq, hidden]` what their positions and types `[batch, seq]` add to them."""
        del positions, token_type_ids
        return hidden

    def finish(self, hidden: jax.Array) -> jax.Array:
        """Map what the last layer gives, `[batch, seq, hidden]`, to the last hidden state: as it is."""
        return hidden

    def pool(self, hidden: jax.Array, tokens: jax.Array | None) -> jax.Array | None:
        """Return one vector for each row, `[batch, hidden]`, if the family has a layer for that.

        Args:
            hidden: `[batch, seq, hidden]`, the last hidden state.
            tokens: bool `[batch, seq]`, which places hold a token; `None`: all.
        """
        del hidden, tokens
        return None

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Run the backbone.

        Args:
            input_ids: int32 `[batch, seq]`.
            attention_mask: 0 where a token is padding, `[batch, seq]`.
            token_type_ids: int32 `[batch, seq]`, which of the sequences given together a token is of; 0 if `None`.
            position_ids: int32 `[batch, seq]`; the running count of tokens if `None`, anew in each segment.
            inputs_embeds: `[batch, seq, hidden]`, in place of `input_ids`.
            segment_ids: int32 `[batch, seq]`; tokens see only their own segment.
            output_hidden_states: also return the embeddings and each layer's output; `None`: as the config says.
            output_attentions: also return the attention weights; `None`: as the config says.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, shapes that do not fit, more tokens than
                there are positions, or types for a family that has none.
        """
        if token_type_ids is not None and not self.has_types:
            raise ValueError(f"{type(self).__name__} has no token types: leave token_type_ids out")
        with_states, with_attentions = extras_asked(self.config, output_hidden_states, output_attentions)
        hidden = embed_or_take(self.embed_tokens, input_ids, inputs_embeds, self.dtype)
        batch, length = hidden.shape[:2]
        if attention_mask is None and position_ids is None and segment_ids is None:
            check_length(self, length)
        _, mask, tokens, positions = place_tokens(attention_mask, segment_ids, None, batch, length)
        if position_ids is None:
            positions = self.count(positions, tokens, input_ids, segment_ids)
        else:
            positions = jnp.broadcast_to(jnp.asarray(position_ids), (batch, length))
        types = jnp.zeros((batch, length), jnp.int32) if token_type_ids is None else jnp.asarray(token_type_ids)
        hidden = self.place(hidden, positions, types)
        inputs = LayerInputs(
            rotary=None if self.rotary is None else self.rotary(positions, self.dtype),
            mask=mask,
            tokens=tokens,
            output_attentions=with_attentions,
            output_hidden_states=with_states,
        )
        out = self.layers.run(hidden, inputs, None, self.config.gradient_checkpointing)
        hidden = self.finish(out.hidden)
        return BaseModelOutput(
            last_hidden_state=hidden,
            pooler_output=self.pool(hidden, tokens),
            hidden_states=(*out.inputs, hidden) if with_states else None,
            attentions=out.collect("attention") if with_attentions else None,
        )


def _counted_on(positions: jax.Array, tokens: jax.Array, longest: int | None) -> jax.Array:
    """Let the padding behind a row's tokens count on from the last one, as in transformers.

    Tokens never see it, but it has hidden states of its own, and a head that weighs all places of a row against each
    other (question answering) reads them. It stops at the last position there is.
    """
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    behind = slots - jax.lax.cummax(jnp.where(tokens, slots, 0), axis=1)
    counted = positions + behind
    return jnp.where(tokens, positions, counted if longest is None else jnp.minimum(counted, longest - 1))


def first_token(hidden: jax.Array, tokens: jax.Array | None) -> jax.Array:
    """Return the first token's vector of each row, `[batch, hidden]`: the first that is not padding."""
    if tokens is None:
        return hidden[:, 0]
    first = jnp.argmax(tokens, axis=1)
    return jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]


def encoder_rules() -> PartitionRules:
    """Return the partition rules of the usual encoder: heads and MLP over `tp`, the other side over `fsdp`."""
    return (
        (r"embed_tokens/embedding", PartitionSpec("tp", "fsdp")),
        (r"embed_\w+/embedding", PartitionSpec(None, "fsdp")),
        (r"self_attn/(q|k|v)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"self_attn/o_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"mlp/(gate|up)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"mlp/down_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"(pooler|transform|dense)/kernel", PartitionSpec("tp", "fsdp")),  # a norm comes next: it takes whole vectors
        (r"decoder/kernel", PartitionSpec("fsdp", "tp")),
        (r"(classifier|qa_outputs)/kernel", PartitionSpec("fsdp", None)),
        (r"(q|k|v|gate|up)_proj/bias|decoder/bias|vocab_bias", PartitionSpec("tp")),
        (r"norm/scale|bias", PartitionSpec()),
    )
