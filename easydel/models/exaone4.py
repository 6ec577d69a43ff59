"""EXAONE 4 (arXiv:2507.11407): norms after attention and MLP; full layers beside sliding ones do not rotate."""

from __future__ import annotations

from typing import Any

import jax
import transformers
from flax import nnx

from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, LayerInputs, LayerOutput, RMSNorm, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules, window_of
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("exaone4")
class Exaone4Config(EasyDeLBaseConfig, transformers.Exaone4Config):
    """Fields of `transformers.Exaone4Config`, and this library's runtime settings.

    Raises:
        ValueError: neither `layer_types` nor a `sliding_window_pattern` that says what they are.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:  # type: ignore[has-type]
            pattern = self.sliding_window_pattern
            if self.sliding_window is None:  # transformers' config divides by zero here
                self.layer_types = ["full_attention"] * self.num_hidden_layers
            elif not isinstance(pattern, int) or pattern < 1:
                raise ValueError(
                    f"sliding_window_pattern={pattern!r} does not say which layers slide: give a number from 1 on "
                    "(every so many layers a full one), or layer_types"
                )
        super().__post_init__(**kwargs)

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Exaone4Block(nnx.Module):
    """One layer, full or sliding: what attention and what the MLP adds is normalised.

    Raises:
        ValueError: a sliding layer without a `sliding_window`.
    """

    def __init__(self, config: Exaone4Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        fields, slides = attention_fields(config), layer_type == "sliding_attention"
        if slides and config.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, but sliding_window is None: give its size")

        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)

        self.self_attn = Attention(
            **fields,
            window=window_of(config, layer_type),
            qk_norm=lambda: norm(fields["head_dim"]),
            rotates=slides or config.sliding_window is None,
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


@register_module(TaskType.BASE, config=Exaone4Config)
class Exaone4Model(Decoder):
    """The EXAONE 4 backbone."""

    block_class = Exaone4Block


@register_module(TaskType.CAUSAL_LM, config=Exaone4Config)
class Exaone4ForCausalLM(CausalLM):
    """EXAONE 4 with a language-model head."""

    backbone_class = Exaone4Model


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Exaone4Config)
class Exaone4ForSequenceClassification(SequenceClassifier):
    """EXAONE 4 with a classification head on the last token."""

    backbone_class = Exaone4Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Exaone4Config)
class Exaone4ForTokenClassification(DecoderTokenClassifier):
    """EXAONE 4 with a classification head on every token."""

    backbone_class = Exaone4Model


@register_module(TaskType.QUESTION_ANSWERING, config=Exaone4Config)
class Exaone4ForQuestionAnswering(QuestionAnswering):
    """EXAONE 4 with a head that marks the answer to a question."""

    backbone_class = Exaone4Model
    base_model_prefix = "transformer"
