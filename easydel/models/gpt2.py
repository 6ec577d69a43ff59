"""GPT-2 (Radford et al., 2019): pre-norm blocks, learned positions, LayerNorm, one fused projection in the files."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.transforms import Split
from easydel.hub.weight_map import WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import MLP, Attention, Embed, LayerInputs, LayerOutput, layer_norm, make_dropout
from easydel.layers.linear import normal_init
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier, TokenClassifier
from easydel.sharding import PartitionRules


@register_config("gpt2")
class GPT2Config(EasyDeLBaseConfig, transformers.GPT2Config):
    """Fields of `transformers.GPT2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class GPT2Block(nnx.Module):
    """One layer; `divisor` of the attention products' scale tells layers apart where the config says so."""

    def __init__(self, config: GPT2Config, divisor: int, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        if config.add_cross_attention:
            raise UnsupportedError("add_cross_attention=True is not supported by GPT2 models here")
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        # Layers that write to the residual stream start smaller, the more of them there are.
        stddev = float(config.initializer_range)
        deviations = dict.fromkeys(("q_proj", "k_proj", "v_proj", "up_proj"), stddev)
        deviations |= dict.fromkeys(("o_proj", "down_proj"), stddev / (2 * config.n_layer) ** 0.5)
        head_dim = config.n_embd // config.n_head
        if head_dim * config.n_head != config.n_embd:
            raise ValueError(f"n_head={config.n_head} must divide n_embd={config.n_embd}")

        def norm() -> nnx.LayerNorm:
            return layer_norm(config.n_embd, config.layer_norm_epsilon, **options)

        self.input_layernorm = norm()
        self.self_attn = Attention(
            config.n_embd,
            config.n_head,
            config.n_head,
            head_dim,
            qkv_bias=True,
            out_bias=True,
            scale=(head_dim**-0.5 if config.scale_attn_weights else 1.0) / divisor,
            mechanism=config.attn_mechanism,
            block_size=config.attn_block_size,
            dropout=config.attn_pdrop,
            init_stddev=deviations,
            **options,
        )
        self.post_attention_layernorm = norm()
        inner = config.n_inner or 4 * config.n_embd
        self.mlp = MLP(config.n_embd, inner, act=config.activation_function, init_stddev=deviations, **options)
        self.dropout = make_dropout(config.resid_pdrop, options["rngs"])

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        out = self.self_attn(self.input_layernorm(hidden), inputs, cache)
        hidden = hidden + self.dropout(out.hidden)
        return out.replace(hidden=hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden))))


@register_module(TaskType.BASE, config=GPT2Config)
class GPT2Model(Decoder):
    """The GPT-2 backbone."""

    block_class = GPT2Block
    base_model_prefix = "transformer"
    has_padding_token = False
    harmless_extras = (r"attn\.(masked_)?bias$",)
    weight_map = (
        WeightRule("attn.c_attn.weight", tuple(f"self_attn/{name}_proj/kernel" for name in "qkv"), Split(1)),
        WeightRule("attn.c_attn.bias", tuple(f"self_attn/{name}_proj/bias" for name in "qkv"), Split(0)),
        WeightRule("attn.c_proj.weight", "self_attn/o_proj/kernel"),
        WeightRule("mlp.c_fc.weight", "mlp/up_proj/kernel"),
        WeightRule("mlp.c_proj.weight", "mlp/down_proj/kernel"),
        WeightRule("attn.c_proj", "self_attn/o_proj", None),
        WeightRule("mlp.c_fc", "mlp/up_proj", None),
        WeightRule("mlp.c_proj", "mlp/down_proj", None),
        WeightRule("ln_1", "input_layernorm", None),
        WeightRule("ln_2", "post_attention_layernorm", None),
        WeightRule("ln_f", "norm", None),
        WeightRule("wte", "embed_tokens", None),
        WeightRule("wpe", "embed_positions", None),
        WeightRule("h", "layers", None),
    )

    @staticmethod
    def layer_kinds(config: GPT2Config) -> list[int]:
        """Return what each layer divides its attention products by."""
        return [n + 1 if config.scale_attn_by_inverse_layer_idx else 1 for n in range(config.n_layer)]

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.n_embd, self.config.layer_norm_epsilon, **self.dtypes)

    def make_rotary(self) -> None:
        """Positions are learned."""

    def add_layers(self, rngs: nnx.Rngs) -> None:
        """Make the learned positions, and the dropout after them."""
        config, initial = self.config, normal_init(self.config.initializer_range)
        self.embed_positions = Embed(
            config.n_positions, config.n_embd, embedding_init=initial, rows=None, rngs=rngs, **self.dtypes
        )
        self.dropout = make_dropout(config.embd_pdrop, rngs)

    @property
    def longest_sequence(self) -> int:
        """The number of learned positions."""
        return self.config.n_positions

    def place(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """Add the learned positions."""
        return self.dropout(hidden + self.embed_positions(positions))


@register_module(TaskType.CAUSAL_LM, config=GPT2Config)
class GPT2LMHeadModel(CausalLM):
    """GPT-2 with a language-model head."""

    backbone_class = GPT2Model
    base_model_prefix = "transformer"
    tied_weight = "wte.weight"


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=GPT2Config)
class GPT2ForSequenceClassification(SequenceClassifier):
    """GPT-2 with a classification head on the last token."""

    backbone_class = GPT2Model
    base_model_prefix = "transformer"


@register_module(TaskType.TOKEN_CLASSIFICATION, config=GPT2Config)
class GPT2ForTokenClassification(TokenClassifier):
    """GPT-2 with a classification head on every token."""

    backbone_class = GPT2Model
    base_model_prefix = "transformer"
