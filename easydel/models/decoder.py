"""The forward pass of a decoder-only backbone, for every family that is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.caching import Cache
from easydel.errors import UnsupportedError
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.forward import check_length
from easydel.layers import (
    AttentionBias,
    AttentionMask,
    Embed,
    LayerInputs,
    RMSNorm,
    RotaryByKind,
    RotaryEmbedding,
    make_layers,
)
from easydel.layers.linear import normal_init
from easydel.layers.stack import StackOutput
from easydel.models.inputs import embed_or_take, extras_asked, place_tokens
from easydel.outputs import BaseModelOutput
from easydel.sharding import PartitionRules


class Decoder(EasyDeLBaseModule):
    """Embeddings, a stack of blocks and a final norm.

    A family sets `block_class`, called as `block_class(config, kind, dtype=…, param_dtype=…, precision=…, rngs=…)` for
    each of `layer_kinds(config)`, and overrides what else is its own: `make_norm`, `make_rotary`, `add_layers`,
    `embed`, `default_positions`, `place`, `position_bias`, `finish`.
    """

    block_class: ClassVar[Callable[..., nnx.Module]]
    base_model_prefix: ClassVar[str] = "model"
    harmless_extras: ClassVar[tuple[str, ...]] = (r"rotary_emb\.inv_freq$",)
    has_padding_token: ClassVar[bool] = True
    """Whether looking up `config.pad_token_id` leaves its vector untrained."""
    partial_rotary: ClassVar[bool] = False
    """Whether `partial_rotary_factor` of `config.rope_parameters` says how much of a head is rotated."""
    rotary_by_kind: ClassVar[bool] = False
    """Whether `config.rope_parameters` holds parameters for each kind of layer; a block then takes its own rotation."""
    wide_rotary: ClassVar[bool] = False
    """Whether heads are rotated in float32, whatever the dtype of computation."""

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
        dtypes = self.dtypes
        self.embed_tokens = Embed(
            config.vocab_size,
            self.token_size,
            embedding_init=normal_init(config.initializer_range),
            precision=precision,
            padding_idx=getattr(config, "pad_token_id", None) if self.has_padding_token else None,
            rngs=rngs,
            **dtypes,
        )
        make = type(self).block_class
        self.layers = make_layers(
            lambda kind: make(config, kind, precision=precision, rngs=rngs, **dtypes),
            self.layer_kinds(config),
            rngs,
            scan=config.scan_layers,
        )
        self.norm: Any = self.make_norm()
        self.rotary = self.make_rotary()
        self.add_layers(rngs)

    @property
    def dtypes(self) -> dict[str, Any]:
        """The arguments `dtype` and `param_dtype` of layers."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def token_size(self) -> int:
        """Size of the vectors that stand for tokens: the embedding's, and those that a head is given."""
        return self.config.hidden_size

    @staticmethod
    def layer_kinds(config: Any) -> list[Any]:
        """Return what tells each layer from the others: here `layer_types`."""
        return layer_types(config)

    def make_norm(self) -> nnx.Module | None:
        """Make the norm after the last layer."""
        return RMSNorm(self.config.hidden_size, epsilon=self.config.rms_norm_eps, **self.dtypes)

    def make_rotary(self) -> RotaryEmbedding | RotaryByKind | None:
        """Make the rotary positions of all layers; `None` if there are none."""
        parameters = self.config.rope_parameters
        if not self.rotary_by_kind:
            return self._rotary(parameters)
        kinds = sorted(set(layer_types(self.config)))
        return RotaryByKind(tuple((kind, self._rotary(parameters[kind])) for kind in kinds))

    def _rotary(self, parameters: dict[str, Any]) -> RotaryEmbedding:
        return RotaryEmbedding(
            parameters,
            head_dim=getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads,
            max_position_embeddings=self.config.max_position_embeddings,
            partial=self.partial_rotary,
        )

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make what the family has besides: nothing here."""

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence the model can take at all; `None`: any."""
        return None

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Map token ids `[batch, seq]` to vectors `[batch, seq, hidden]`."""
        return self.embed_tokens(input_ids)

    def default_positions(self, positions: jax.Array, tokens: jax.Array | None) -> jax.Array:
        """Return the positions that hold where none are given, int32 `[batch, seq]`.

        Args:
            positions: the running count of tokens from 0 on; padding has that of the token before it.
            tokens: bool `[batch, seq]`, which places hold a token; `None`: all.
        """
        del tokens
        return positions

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Give embedded tokens what their positions `[batch, seq]` add to them: nothing, if layers rotate."""
        del positions
        return hidden

    def position_bias(self, mask: AttentionMask, length: int) -> AttentionBias | None:
        """Return what positions add to attention's products: nothing, if they have their place elsewhere.

        Args:
            mask: over all slots.
            length: how many slots there are if the mask knows none that are padding.
        """
        del mask, length
        return None

    def finish(self, hidden: jax.Array) -> jax.Array:
        """Map what the last layer gives, `[batch, seq, hidden]`, to what heads are given."""
        return self.norm(hidden)

    def hidden_states(self, out: StackOutput, last: jax.Array) -> tuple[jax.Array, ...]:
        """Return what `output_hidden_states` asks for: the embeddings, each layer's output, the last one normed."""
        return (*out.inputs, last)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Run the backbone.

        Args:
            input_ids: int32 `[batch, seq]`.
            attention_mask: 0 where a token is padding, `[batch, seq]`.
            position_ids: int32 `[batch, seq]`; the running count of tokens if `None`, anew in each segment.
            inputs_embeds: `[batch, seq, hidden]`, in place of `input_ids`.
            segment_ids: int32 `[batch, seq]`; tokens see only their own segment.
            cache: from `init_operations_cache`, or an earlier output.
            output_hidden_states: also return the embeddings and each layer's output; `None`: as the config says.
            output_attentions: also return the attention weights, if there are any; `None`: as the config says.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or shapes that do not fit.
        """
        with_states, with_attentions = extras_asked(self.config, output_hidden_states, output_attentions)
        hidden = embed_or_take(self.embed, input_ids, inputs_embeds, self.dtype)
        batch, length = hidden.shape[:2]
        if attention_mask is None and position_ids is None and segment_ids is None and cache is None:
            check_length(self, length)
        cache, mask, tokens, positions = place_tokens(attention_mask, segment_ids, cache, batch, length)
        if position_ids is None:
            positions = self.default_positions(positions, tokens)
        else:
            positions = jnp.broadcast_to(jnp.asarray(position_ids), (batch, length))
        hidden = self.place(hidden, positions)
        rotary_dtype = jnp.float32 if self.wide_rotary else self.dtype
        inputs = LayerInputs(
            rotary=None if self.rotary is None else self.rotary(positions, rotary_dtype),
            mask=mask,
            tokens=tokens,
            bias=self.position_bias(mask, length),
            output_attentions=with_attentions,
            output_hidden_states=with_states,
        )
        remat = self.config.gradient_checkpointing
        out = self.layers.run(hidden, inputs, None if cache is None else cache.layers, remat)
        hidden = self.finish(out.hidden)
        return BaseModelOutput(
            last_hidden_state=hidden,
            cache=None if cache is None else cache.with_layers(out.caches),
            hidden_states=self.hidden_states(out, hidden) if with_states else None,
            attentions=(out.collect("attention") or None) if with_attentions else None,
            router_logits=out.collect("router_logits") or None,
        )


def layer_types(config: Any) -> list[str]:
    """Return the kind of each layer: `"full_attention"` or `"sliding_attention"`.

    Raises:
        UnsupportedError: another kind is asked for.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise UnsupportedError(f"layer_types {unknown} are not supported by {type(config).__name__}'s models")
    return list(kinds)


def window_of(config: Any, layer_type: str) -> int | None:
    """Return the attention window of a layer of this kind.

    Raises:
        ValueError: a sliding layer, and the config has no window.
    """
    if layer_type != "sliding_attention":
        return None
    if config.sliding_window is None:
        raise ValueError("layer_types names sliding_attention layers, which need sliding_window: got None")
    return config.sliding_window


def decoder_rules() -> PartitionRules:
    """Return the partition rules of the usual decoder: heads and MLP over `tp`, the other side over `fsdp`."""
    return (
        (r"embed_tokens/embedding", PartitionSpec("tp", "fsdp")),
        (r"embed_positions/embedding", PartitionSpec(None, "fsdp")),
        (r"self_attn/(q|k|v)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"self_attn/o_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"mlp/(gate|up)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"mlp/down_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"lm_head/kernel", PartitionSpec("fsdp", "tp")),
        (r"(score|classifier|qa_outputs)/kernel", PartitionSpec("fsdp", None)),
        (r"(q|k|v|gate|up)_proj/bias|vocab_bias", PartitionSpec("tp")),
        (r"(norm|layernorm)/scale|bias", PartitionSpec()),
    )
