"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, none before; queries and keys normalised over all heads."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, LayerInputs, LayerOutput, RMSNorm, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("olmo2")
class Olmo2Config(EasyDeLBaseConfig, transformers.Olmo2Config):
    """Fields of `transformers.Olmo2Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Olmo2Block(nnx.Module):
    """One layer: what attention and what the MLP adds is normalised."""

    def __init__(self, config: Olmo2Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, bias = attention_fields(config), config.attention_bias

        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        widths = (fields["num_heads"] * fields["head_dim"], fields["num_kv_heads"] * fields["head_dim"])
        self.self_attn = Attention(
            **fields,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=(lambda: norm(widths[0]), lambda: norm(widths[1])),
            norm_per_head=False,
            **options,
        )
        self.post_attention_layernorm = norm(config.hidden_size)
        self.mlp = GatedMLP(**mlp_fields(config), **options)
        self.post_feedforward_layernorm = norm(config.hidden_size)

    def __call__(self, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> LayerOutput:
        """Map `[batch, seq, hidden]` to the same shape, the updated cache and the attention weights."""
        out = self.self_attn(hidden, inputs, cache)
        hidden = hidden + self.post_attention_layernorm(out.hidden)
        return out.replace(hidden=hidden + self.post_feedforward_layernorm(self.mlp(hidden)))


@register_module(TaskType.BASE, config=Olmo2Config)
class Olmo2Model(Decoder):
    """The OLMo 2 backbone."""

    block_class = Olmo2Block


@register_module(TaskType.CAUSAL_LM, config=Olmo2Config)
class Olmo2ForCausalLM(CausalLM):
    """OLMo 2 with a language-model head."""

    backbone_class = Olmo2Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Olmo2Config)
class Olmo2ForSequenceClassification(SequenceClassifier):
    """OLMo 2 with a classification head on the last token."""

    backbone_class = Olmo2Model
