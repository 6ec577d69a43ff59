"""Phi-3 (arXiv:2404.14219): Llama's block with part of each head rotated; its files hold q, k, v and gate, up fused."""

from __future__ import annotations

import warnings
from typing import Any

import transformers

from easydel.caching import Cache
from easydel.hub.weight_map import TRANSPOSE, Split, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, attention_fields, mlp_fields
from easydel.models.decoder import Decoder, decoder_rules
from easydel.models.tasks import CausalLM, DecoderTokenClassifier, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("phi3")
class Phi3Config(EasyDeLBaseConfig, transformers.Phi3Config):
    """Fields of `transformers.Phi3Config`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split heads and MLP over `tp`, the other side over `fsdp`."""
        return decoder_rules()


class Phi3Block(PreNormBlock):
    """One layer; all have the same window, if there is one."""

    def __init__(self, config: Phi3Config, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            Attention(**attention_fields(config), window=config.sliding_window, **options),
            GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dropout=(config.resid_pdrop, config.resid_pdrop),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=options["rngs"],
        )


@register_module(TaskType.BASE, config=Phi3Config)
class Phi3Model(Decoder):
    """The Phi-3 backbone."""

    block_class = Phi3Block
    partial_rotary = True
    weight_map = (
        WeightRule(
            "self_attn.qkv_proj.weight",
            tuple(f"self_attn/{name}_proj/kernel" for name in "qkv"),
            Split(0, TRANSPOSE),
        ),
        WeightRule("mlp.gate_up_proj.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), Split(0, TRANSPOSE)),
    )


@register_module(TaskType.CAUSAL_LM, config=Phi3Config)
class Phi3ForCausalLM(CausalLM):
    """Phi-3 with a language-model head."""

    backbone_class = Phi3Model

    def init_operations_cache(self, batch_size: int, max_length: int, starts: Any = None, dtype: Any = None) -> Cache:
        """Make an empty cache; see `EasyDeLBaseModule.init_operations_cache`.

        With `rope_type` `"longrope"`, keys are rotated as the length of the text so far asks. transformers reads the
        whole text again when it outgrows `original_max_position_embeddings`; here keys stay as they were cached.
        """
        rope = self.config.rope_parameters
        if rope["rope_type"] == "longrope" and max_length > rope["original_max_position_embeddings"]:
            warnings.warn(
                f"a text that grows past original_max_position_embeddings={rope['original_max_position_embeddings']} "
                "tokens while it is cached keeps its first keys rotated for a short text, so that logits differ from "
                "those of one run without a cache; texts that stay below and longer prompts are not affected",
                stacklevel=2,
            )
        return super().init_operations_cache(batch_size, max_length, starts, dtype)


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Phi3Config)
class Phi3ForSequenceClassification(SequenceClassifier):
    """Phi-3 with a classification head on the last token."""

    backbone_class = Phi3Model


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Phi3Config)
class Phi3ForTokenClassification(DecoderTokenClassifier):
    """Phi-3 with a classification head on every token."""

    backbone_class = Phi3Model
