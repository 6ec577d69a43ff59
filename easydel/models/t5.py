"""T5 (arXiv:1910.10683): an encoder and a decoder whose only positions are learned biases of relative distances."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.caching import EncoderDecoderCache
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    MLP,
    Attention,
    CrossAttention,
    Embed,
    GatedMLP,
    LayerInputs,
    LayerOutput,
    RelativePositions,
    RMSNorm,
    make_dropout,
    make_layers,
)
from easydel.layers.linear import normal_init
from easydel.layers.stack import StackOutput
from easydel.models.encoder_decoder import EncoderDecoder
from easydel.models.tasks import Seq2SeqLM
from easydel.sharding import PartitionRules


@register_config("t5")
class T5Config(EasyDeLBaseConfig, transformers.T5Config):
    """Fields of `transformers.T5Config`, and this library's runtime settings.

    `tie_word_embeddings=False`, as the checkpoints of T5 1.1 and Flan-T5 say, means a head of its own and decoder
    outputs that are not scaled (`scale_decoder_outputs`).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        tied = kwargs.get("tie_word_embeddings") is not False
        super().__post_init__(**kwargs)
        # transformers sets it to True, and finds an untied head by the tensors of a file: here the config says it.
        self.tie_word_embeddings = tied

    def follow_tensors(self, names: Collection[str], given: Collection[str]) -> None:
        """Read a head of its own from a file that has one, if outputs are not scaled: transformers writes "tied"."""
        if "tie_word_embeddings" not in given and not self.scale_decoder_outputs and "lm_head.weight" in names:
            self.tie_word_embeddings = False

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return (
            (r"embed_tokens/embedding", PartitionSpec("tp", "fsdp")),
            (r"(self|cross)_attn/(q|k|v)_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"(self|cross)_attn/o_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"mlp/(gate|up)_proj/kernel", PartitionSpec("fsdp", "tp")),
            (r"mlp/down_proj/kernel", PartitionSpec("tp", "fsdp")),
            (r"lm_head/kernel", PartitionSpec("fsdp", "tp")),
            (r"norm/scale|relative_attention_bias/embedding", PartitionSpec()),
        )


def initial_deviations(config: T5Config) -> dict[str, float]:
    """Return the deviations of new weights: by fan-in, and queries smaller still, since products are not scaled."""
    hidden, inner = config.d_model**-0.5, (config.num_heads * config.d_kv) ** -0.5
    deviations = {"q_proj": hidden * config.d_kv**-0.5, "k_proj": hidden, "v_proj": hidden, "o_proj": inner}
    deviations |= {"gate_proj": hidden, "up_proj": hidden, "down_proj": config.d_ff**-0.5}
    return {name: config.initializer_factor * deviation for name, deviation in deviations.items()}


def make_norm(config: T5Config, dtype: Any, param_dtype: Any) -> RMSNorm:
    """Make one of the norms, all alike."""
    return RMSNorm(
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        init_scale=config.initializer_factor,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def within_range(hidden: jax.Array) -> jax.Array:
    """Clip what overflows float16: T5's activations do, since it was trained in bfloat16."""
    if hidden.dtype != jnp.float16:
        return hidden
    largest = jnp.finfo(jnp.float16).max
    return jnp.clip(hidden, -largest, largest)


class T5MLP(MLP):
    """The feed-forward layer of the first version, under its names."""

    weight_map = (WeightRule("wi", "up_proj", None), WeightRule("wo", "down_proj", None))


class T5GatedMLP(GatedMLP):
    """The feed-forward layer of version 1.1, under its names."""

    weight_map = (
        WeightRule("wi_0", "gate_proj", None),
        WeightRule("wi_1", "up_proj", None),
        WeightRule("wo", "down_proj", None),
    )


class T5Block(nnx.Module):
    """One layer: self-attention, in the decoder attention to the encoder, and MLP, each behind a norm."""

    def __init__(
        self, config: T5Config, is_decoder: bool, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        options |= {"dropout": config.dropout_rate, "init_stddev": initial_deviations(config)}
        heads: dict[str, Any] = {
            "hidden_size": config.d_model,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_heads,
            "head_dim": config.d_kv,
            "scale": 1.0,
            "mechanism": config.attn_mechanism,
            "block_size": config.attn_block_size,
        }
        self.input_layernorm = make_norm(config, dtype, param_dtype)
        self.self_attn = Attention(**heads, causal=is_decoder, **options)
        if is_decoder:
            self.cross_attention_layernorm = make_norm(config, dtype, param_dtype)
            self.cross_attn = CrossAttention(**heads, **options)
        self.post_attention_layernorm = make_norm(config, dtype, param_dtype)
        feed_forward = T5GatedMLP if config.is_gated_act else T5MLP
        self.mlp = feed_forward(config.d_model, config.d_ff, act=config.dense_act_fn, use_bias=False, **options)
        self.dropout = make_dropout(config.dropout_rate, rngs)
        self.is_decoder = is_decoder

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> EncoderDecoderCache | None:
        """Make this layer's empty cache; the encoder needs none."""
        if not self.is_decoder:
            return None
        attentions = (self.self_attn, self.cross_attn)
        return EncoderDecoderCache(*(layer.init_cache(batch_size, max_length, dtype) for layer in attentions))

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: EncoderDecoderCache | None) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        own = self.self_attn(self.input_layernorm(hidden), inputs, None if cache is None else cache.own)
        hidden = within_range(hidden + self.dropout(own.hidden))
        out = own
        if self.is_decoder:
            normed = self.cross_attention_layernorm(hidden)
            cross = self.cross_attn(normed, inputs, None if cache is None else cache.cross)
            hidden = within_range(hidden + self.dropout(cross.hidden))
            kept = None if cache is None else EncoderDecoderCache(own.cache, cross.cache)
            out = own.replace(cache=kept, cross_attention=cross.attention)
        transformed = self.mlp(self.post_attention_layernorm(hidden))
        return out.replace(hidden=within_range(hidden + self.dropout(transformed)))


class T5Stack(nnx.Module):
    """The encoder or the decoder: blocks that share one table of relative positions, and the final norm."""

    def __init__(self, config: T5Config, is_decoder: bool, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        rngs = options["rngs"]
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        self.relative_attention_bias = RelativePositions(
            config.relative_attention_num_buckets,
            config.num_heads,
            max_distance=config.relative_attention_max_distance,
            bidirectional=not is_decoder,
            init_stddev=config.initializer_factor * config.d_model**-0.5,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        depth = config.num_decoder_layers if is_decoder else config.num_layers
        self.layers = make_layers(
            lambda kind: T5Block(config, kind, **options), [is_decoder] * depth, rngs, scan=config.scan_layers
        )
        self.norm = make_norm(config, dtype, param_dtype)
        self.dropout = make_dropout(config.dropout_rate, rngs)
        self.remat = config.gradient_checkpointing

    def __call__(self, hidden: jax.Array, positions: jax.Array, inputs: LayerInputs, caches: Any) -> StackOutput:
        """Run all layers; see `EncoderDecoder`."""
        del positions  # relative ones are enough
        inputs = inputs.replace(bias=self.relative_attention_bias())
        out = self.layers.run(self.dropout(hidden), inputs, caches, self.remat)
        return out.replace(hidden=self.dropout(self.norm(out.hidden)))


@register_module(TaskType.BASE, config=T5Config)
class T5Model(EncoderDecoder):
    """The T5 backbone."""

    side_class = T5Stack
    weight_map = (
        WeightRule("shared", "embed_tokens", None),
        WeightRule(
            "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "{side}/relative_attention_bias/embedding",
        ),
        WeightRule("{side}.block.{i}.layer.0.SelfAttention", "{side}/layers/{i}/self_attn", None),
        WeightRule("{side}.block.{i}.layer.0.layer_norm", "{side}/layers/{i}/input_layernorm", None),
        WeightRule("decoder.block.{i}.layer.1.EncDecAttention", "decoder/layers/{i}/cross_attn", None),
        WeightRule("decoder.block.{i}.layer.1.layer_norm", "decoder/layers/{i}/cross_attention_layernorm", None),
        WeightRule("encoder.block.{i}.layer.1.DenseReluDense", "encoder/layers/{i}/mlp", None),
        WeightRule("encoder.block.{i}.layer.1.layer_norm", "encoder/layers/{i}/post_attention_layernorm", None),
        WeightRule("decoder.block.{i}.layer.2.DenseReluDense", "decoder/layers/{i}/mlp", None),
        WeightRule("decoder.block.{i}.layer.2.layer_norm", "decoder/layers/{i}/post_attention_layernorm", None),
        *(WeightRule(letter, f"{letter}_proj", None) for letter in "qkvo"),
        WeightRule("final_layer_norm", "norm", None),
    )
    # Once saved by mistake: attention to the encoder has no positions.
    harmless_extras = (r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",)

    def make_embedding(self, **options: Any) -> Embed:
        """Make the table of both sides' tokens."""
        deviation = normal_init(self.config.initializer_factor)
        return Embed(self.config.vocab_size, self.config.d_model, embedding_init=deviation, **options)

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table → the shared one."""
        return {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}


@register_module(TaskType.SEQ2SEQ, config=T5Config)
class T5ForConditionalGeneration(Seq2SeqLM):
    """T5 with a language-model head."""

    backbone_class = T5Model
    weight_map = (WeightRule("", "model", None),)  # its checkpoints name no backbone

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head = self._linear(
                self.config.vocab_size, rngs, stddev=self.config.initializer_factor, roles=(None, "vocab")
            )

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Scale the decoder's states where the head is the embedding and nothing else scales its logits."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def tied_names(self) -> dict[str, str]:
        """Return checkpoint names that repeat another: each side's table, and the head if tied → the shared one."""
        head = {"lm_head.weight": "shared.weight"} if self.config.tie_word_embeddings else {}
        return self.base_model.tied_names() | head
