"""The entries of the dense decoders that vary Llama: windows, biases, norms of heads, soft-caps."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, YARN, rope
from tests.models.table import Family, Variant

_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "output_hidden_states", "pad_token_id",
)  # fmt: skip
_INERT = {name: reason for name, reason in LLAMA.inert.items() if name != "pretraining_tp"}
_KINDS = ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention")

RUNNING = {"padding", "cache", "generate"}
_WINDOW_WITH_GAPS = {"gaps": "its window counts places, those of masked tokens included, as transformers' does"}
_NO_SOFTCAP = {"sdpa": "JAX's own attention has no soft-cap and is refused (tests/layers): no_caps stands in"}


def entry(
    name: str,
    prefix: str,
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    refused: tuple[Any, ...] = LLAMA.refused,
    **inert: str,
) -> Family:
    """Make an entry: Llama's tiny config and fields, and what is the family's own."""
    classes = {
        "base": f"{prefix}Model",
        "causal-lm": f"{prefix}ForCausalLM",
        "sequence-classification": f"{prefix}ForSequenceClassification",
    }
    shared = {field: LLAMA.fields[field] for field in _COMMON}
    return Family(name, classes, {**LLAMA.config, **config}, variants, shared | fields, _INERT | inert, refused=refused)


_MISTRAL = entry(
    "mistral",
    "Mistral",
    {"sliding_window": 6},
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS),
        Variant("no_window", {"sliding_window": None, "head_dim": 12}, thorough=True, proofs={"gaps"}),
        Variant("tied", {"tie_word_embeddings": True, "pad_token_id": 0}, thorough=True, proofs={"sharding"}),
        Variant("mqa_window_3", {"num_key_value_heads": 1, "sliding_window": 3}, proofs=RUNNING),
        Variant("mha_window_1", {"num_key_value_heads": 4, "sliding_window": 1}, proofs={"padding", "cache"}),
        Variant("window_of_the_prompt", {"sliding_window": 7}, proofs={"generate"}),
        Variant("window_reached_while_generating", {"sliding_window": 16}, proofs=RUNNING),
        Variant("window_never_reached", {"sliding_window": 100}, proofs={"generate"}),
        Variant("layer_types_change_nothing", {"layer_types": ["full_attention", "sliding_attention"]}),
        Variant("linear", rope("linear", factor=4.0)),
    ),
    {
        "hidden_act": {"hidden_act": "tanh"},
        "head_dim": {"head_dim": 6},
        "sliding_window": {"sliding_window": 3},
    },
)

_QWEN = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
_QWEN_FIELDS = {
    "hidden_act": {"hidden_act": "tanh"},
    "use_sliding_window": {"use_sliding_window": False},
    "sliding_window": {"sliding_window": 3},
    "max_window_layers": {"max_window_layers": 0},
    "layer_types": {"layer_types": ["sliding_attention", "full_attention"]},
}
_SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
_QWEN_WINDOWS = (
    Variant("all_sliding_3", {"max_window_layers": 0, "sliding_window": 3}, proofs=RUNNING),
    Variant("sliding_first", _SLIDING_FIRST, proofs=RUNNING),
    Variant("no_layer_slides", {"max_window_layers": 2}),
    Variant("window_without_size", {"sliding_window": None}),
    Variant("window_never_reached", {"max_window_layers": 0, "sliding_window": 100}, proofs={"generate"}),
    Variant("mha", {"num_key_value_heads": 4}),
    Variant("mqa", {"num_key_value_heads": 1}),
    Variant("yarn", rope("yarn", **YARN), proofs={"generate"}),
)
_TIED_FULL = {"tie_word_embeddings": True, "use_sliding_window": False}

_QWEN2 = entry(
    "qwen2",
    "Qwen2",
    _QWEN,
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS),
        Variant("tied_full", _TIED_FULL, thorough=True, proofs={"gaps", "sharding"}),
        *_QWEN_WINDOWS,
    ),
    _QWEN_FIELDS,
    (*LLAMA.refused, _KINDS),
)

_QWEN3 = entry(
    "qwen3",
    "Qwen3",
    {**_QWEN, "head_dim": 8},
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS),
        Variant("tied_full", _TIED_FULL, proofs={"gaps", "generate", "files"}),
        Variant("biases", {"attention_bias": True, "head_dim": 10}, thorough=True, proofs={"sharding"}),
        *_QWEN_WINDOWS,
    ),
    {**_QWEN_FIELDS, "head_dim": {"head_dim": 6}, "attention_bias": {"attention_bias": True}},
    (*LLAMA.refused, _KINDS),
)

_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}  # small enough to matter at this size
_NO_CAPS = dict.fromkeys(_CAPS)
_UNTIED = {"tie_word_embeddings": False}  # tied and this small, it soon repeats one token

_GEMMA2 = entry(
    "gemma2",
    "Gemma2",
    {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 20, "pad_token_id": None, **_CAPS},
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS | _NO_SOFTCAP),
        Variant("no_caps", _NO_CAPS, thorough=True, proofs={"sdpa"}),
        Variant("untied", _UNTIED | {"attention_bias": True}, thorough=True, proofs={"sharding"}),
        Variant("all_full", {"layer_types": ["full_attention"] * 2}, proofs={"gaps"}),
        Variant("caps_as_published", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        Variant("attention_cap_alone", _UNTIED | {"final_logit_softcapping": None}, proofs={"gradients", "generate"}),
        Variant("final_cap_alone", _UNTIED | {"attn_logit_softcapping": None}, proofs={"gradients", "generate"}),
        Variant("scalar", _UNTIED | {"query_pre_attn_scalar": 5, "head_dim": 10}, proofs={"generate"}),
        Variant("window_3", _UNTIED | {"sliding_window": 3}, proofs=RUNNING),
        Variant("window_never_reached", _UNTIED | {"sliding_window": 100}, proofs={"generate"}),
        Variant("full_first", _UNTIED | {"layer_types": ["full_attention", "sliding_attention"]}, proofs=RUNNING),
        Variant(
            "mqa_all_sliding",
            _UNTIED | {"num_key_value_heads": 1, "layer_types": ["sliding_attention"] * 2},
            proofs=RUNNING,
        ),
        Variant("mha", {"num_key_value_heads": 4, "pad_token_id": 0}),
        Variant("linear", rope("linear", factor=4.0)),
    ),
    {
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "hidden_activation": {"hidden_activation": "relu"},
        "head_dim": {"head_dim": 6},
        "attention_bias": {"attention_bias": True},
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 5},
        "sliding_window": {"sliding_window": 3},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
        "final_logit_softcapping": {"final_logit_softcapping": 3.0},
        "attn_logit_softcapping": {"attn_logit_softcapping": 1.0},
    },
    (
        ({"hidden_activation": "snake"}, "not supported"),
        *LLAMA.refused[1:],
        _KINDS,
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ),
    use_bidirectional_attention="True is refused when the model is built",
)

DENSE = (_MISTRAL, _QWEN2, _QWEN3, _GEMMA2)
