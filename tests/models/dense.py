"""The entries of the dense decoders that vary Llama: windows, biases, norms of heads, soft-caps."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA
from tests.models.table import Family, Variant

_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "output_hidden_states", "pad_token_id",
)  # fmt: skip
_INERT = {name: reason for name, reason in LLAMA.inert.items() if name != "pretraining_tp"}
_FULL_THEN_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}


def entry(
    name: str, prefix: str, config: dict[str, Any], variants: tuple[Variant, ...], fields: dict[str, Any], **inert: str
) -> Family:
    """Make an entry: Llama's tiny config and fields, and what is the family's own."""
    classes = {
        "base": f"{prefix}Model",
        "causal-lm": f"{prefix}ForCausalLM",
        "sequence-classification": f"{prefix}ForSequenceClassification",
    }
    shared = {field: LLAMA.fields[field] for field in _COMMON}
    return Family(name, classes, classes, {**LLAMA.config, **config}, variants, shared | fields, _INERT | inert)


_QWEN = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
_QWEN_FIELDS = {
    "hidden_act": {"hidden_act": "tanh"},
    "use_sliding_window": {"use_sliding_window": False},
    "sliding_window": {"sliding_window": 3},
    "max_window_layers": {"max_window_layers": 0},
    "layer_types": {"layer_types": ["sliding_attention", "full_attention"]},
}

DENSE = (
    entry(
        "mistral",
        "Mistral",
        {"sliding_window": 6},
        (Variant("gqa", generate=True), Variant("no_window", {"sliding_window": None, "head_dim": 12})),
        {
            "hidden_act": {"hidden_act": "tanh"},
            "head_dim": {"head_dim": 6},
            "sliding_window": {"sliding_window": 3},
        },
    ),
    entry(
        "qwen2",
        "Qwen2",
        _QWEN,
        (
            Variant("gqa", generate=True),
            Variant("tied_full", {"tie_word_embeddings": True, "use_sliding_window": False}),
        ),
        _QWEN_FIELDS,
    ),
    entry(
        "qwen3",
        "Qwen3",
        {**_QWEN, "head_dim": 8},
        (Variant("gqa", generate=True), Variant("biases", {"attention_bias": True, "head_dim": 12})),
        {**_QWEN_FIELDS, "head_dim": {"head_dim": 6}, "attention_bias": {"attention_bias": True}},
    ),
    entry(
        "gemma2",
        "Gemma2",
        {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 20, "pad_token_id": None},
        (
            Variant("gqa", generate=True),
            Variant("no_caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
            Variant("untied", {"tie_word_embeddings": False, "attention_bias": True}),
        ),
        {
            "tie_word_embeddings": {"tie_word_embeddings": False},
            "hidden_activation": {"hidden_activation": "relu"},
            "head_dim": {"head_dim": 6},
            "attention_bias": {"attention_bias": True},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 5},
            "sliding_window": {"sliding_window": 3},
            "layer_types": _FULL_THEN_SLIDING,
            "final_logit_softcapping": {"final_logit_softcapping": 3.0},
            "attn_logit_softcapping": {"attn_logit_softcapping": 1.0},
        },
        use_bidirectional_attention="True is refused when the model is built",
    ),
)
