"""The entries of the decoders with mixtures of experts; Mixtral's proofs of experts and of their loss stand for all."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, YARN, rope
from tests.models.mixtral import MIXTRAL
from tests.models.table import SUFFIXES, Family, Variant

_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "output_hidden_states",
    "output_attentions", "pad_token_id",
)  # fmt: skip
_INERT = {name: reason for name, reason in MIXTRAL.inert.items() if name != "router_jitter_noise"}
_WINDOW_WITH_GAPS = {"gaps": "its window counts places, those of masked tokens included, as transformers' does"}
_DECODER = tuple(SUFFIXES)[:3]
_FEW = ({"num_experts_per_tok": 5}, "5 of 4 experts")
_BIASED = {"attention_bias": {"attention_bias": True}}


def entry(
    name: str,
    prefix: str,
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    inert: dict[str, str] | None = None,
    *,
    tasks: tuple[str, ...] = _DECODER,
    refused: tuple[Any, ...] = (*LLAMA.refused, _FEW),
    **options: Any,
) -> Family:
    """Make an entry: Llama's tiny config with two experts for each token, and what is the family's own."""
    theirs = {task: f"{prefix}{SUFFIXES[task]}" for task in tasks}
    shared = {field: LLAMA.fields[field] for field in _COMMON} | {
        "num_experts_per_tok": {"num_experts_per_tok": 3},
        "output_router_logits": {"output_router_logits": True},
    }
    inert = _INERT | (inert or {})
    every = {field: change for field, change in (shared | fields).items() if field not in inert}
    config = {**LLAMA.config, "num_experts_per_tok": 2, **config}
    return Family(name, theirs, config, variants, every, inert, refused=refused, **options)


_TIED = {"tie_word_embeddings": True, "output_router_logits": True}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
_QWEN_FIELDS = {
    "num_experts": {"num_experts": 3},
    "moe_intermediate_size": {"moe_intermediate_size": 40},
    "intermediate_size": {"intermediate_size": 40, "mlp_only_layers": [1]},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "mlp_only_layers": {"mlp_only_layers": [0]},
    "norm_topk_prob": {"norm_topk_prob": True},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 3},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 5},
}
_READS_PADDING = {
    "question-answering": "start and end are looked for in padding, too, whose positions transformers counts on"
}
_MIXED = {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [1], "norm_topk_prob": True}
_WINDOW = {"use_sliding_window": True, "sliding_window": 6}

_QWEN2_MOE = entry(
    "qwen2_moe",
    "Qwen2Moe",
    {**_QWEN, "shared_expert_intermediate_size": 40},
    (
        Variant("gqa", excused={"fresh": "its gate of the shared expert has few numbers for statistics: see tied"}),
        Variant("mixed_window", _MIXED | _WINDOW | {"max_window_layers": 3}, proofs={"gradients", "generate"}),
        Variant("tied", _TIED | {"qkv_bias": False, "head_dim": 12, "hidden_size": 256}, proofs={"fresh"}),
    ),
    _QWEN_FIELDS
    | {
        "shared_expert_intermediate_size": {"shared_expert_intermediate_size": 24},
        "qkv_bias": {"qkv_bias": False},
        "max_window_layers": _WINDOW | {"max_window_layers": 1, "num_hidden_layers": 3},
        "layer_types": _WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
    },
    tasks=tuple(SUFFIXES),
    reads_padding=_READS_PADDING,
    refused=(*LLAMA.refused, _FEW, ({"layer_types": ["sliding_attention"] * 2}, "no window")),
)

_QWEN3_MOE = entry(
    "qwen3_moe",
    "Qwen3Moe",
    _QWEN,
    (
        Variant("gqa"),
        Variant("mixed_window", _MIXED | _WINDOW | {"attention_bias": True}, proofs={"gradients", "generate"}),
        Variant("tied", _TIED | {"head_dim": 12}),
    ),
    _QWEN_FIELDS | _BIASED,
    tasks=tuple(SUFFIXES),
    reads_padding=_READS_PADDING,
)

_OLMOE = entry(
    "olmoe",
    "Olmoe",
    {"num_experts": 4, "intermediate_size": 24, "pad_token_id": None, "clip_qkv": 1.5},
    (
        Variant("gqa"),
        Variant("no_clip", {"clip_qkv": None, "norm_topk_prob": True, "attention_bias": True}, proofs={"gradients"}),
        Variant("mha_tied", _TIED | {"num_key_value_heads": None}),
    ),
    {
        "intermediate_size": LLAMA.fields["intermediate_size"],
        "num_experts": {"num_experts": 3},
        "norm_topk_prob": {"norm_topk_prob": True},
        "clip_qkv": {"clip_qkv": 0.5},
        **_BIASED,
    },
    tasks=_DECODER[:2],
)

_SCALES = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.25,
}

_GRANITEMOE = entry(
    "granitemoe",
    "GraniteMoe",
    {"num_local_experts": 4, "intermediate_size": 24, **_SCALES},
    (
        Variant("gqa"),
        Variant("unscaled_biases", dict.fromkeys(_SCALES, 1.0) | {"attention_bias": True}, proofs={"gradients"}),
        Variant("mha_tied", _TIED | {"num_key_value_heads": None}),
    ),
    {
        "intermediate_size": LLAMA.fields["intermediate_size"],
        "num_local_experts": {"num_local_experts": 3},
        **{name: {name: 1.0} for name in _SCALES},
        **_BIASED,
    },
    tasks=_DECODER[:2],
)

_MSCALES = {"short_mscale": 1.2, "long_mscale": 1.5}
_LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 16,
}

_PHIMOE = entry(
    "phimoe",
    "Phimoe",
    {"num_local_experts": 4, "intermediate_size": 24, "lm_head_bias": True, "router_jitter_noise": 0.3},
    (
        Variant("gqa"),
        Variant(
            "window_longrope",
            {"sliding_window": 6, "attention_bias": True, "lm_head_bias": False, "head_dim": 8}
            | rope("longrope", **_LONG, **_MSCALES),
            lengths=(12, 24),
            proofs={"gradients", "padding"},
        ),
        Variant("tied", _TIED | {"lm_head_bias": False}),
    ),
    {
        "intermediate_size": LLAMA.fields["intermediate_size"],
        "max_position_embeddings": {"max_position_embeddings": 32, "head_dim": 8}
        | rope("longrope", **_LONG, **_MSCALES),
        "num_local_experts": {"num_local_experts": 3},
        "tie_word_embeddings": {"tie_word_embeddings": True, "lm_head_bias": False},
        "sliding_window": {"sliding_window": 3},
        "router_jitter_noise": {"router_jitter_noise": 0.01},
        "lm_head_bias": {"lm_head_bias": False},
        **_BIASED,
    },
    {
        "num_experts_per_tok": "SparseMixer chooses two, and another number is refused",
        "input_jitter_noise": "of training: test_sparse_mixer.py",
    },
    refused=(
        *LLAMA.refused[::2],
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"tie_word_embeddings": True}, "lm_head_bias"),
    ),
)

_GPT_OSS = entry(
    "gpt_oss",
    "GptOss",
    {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8, "sliding_window": 6, "swiglu_limit": 1.0},
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS | {"fresh": "its sinks are few for statistics: see tied_many"}),
        Variant(
            "full_yarn",
            {"layer_types": ["full_attention"] * 2, "attention_bias": False} | rope("yarn", **YARN, truncate=False),
            proofs={"gradients", "generate", "gaps"},
        ),
        Variant(
            "tied_many",
            _TIED | {"num_attention_heads": 128, "head_dim": 2, "num_local_experts": 128, "swiglu_limit": 7.0},
            proofs={"fresh"},
        ),
    ),
    {
        "intermediate_size": LLAMA.fields["intermediate_size"],
        "head_dim": {"head_dim": 6},
        "num_local_experts": {"num_local_experts": 3},
        "sliding_window": {"sliding_window": 3},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
        "swiglu_alpha": {"swiglu_alpha": 0.5},
        "swiglu_limit": {"swiglu_limit": 0.4},
        "attention_bias": {"attention_bias": False},
    },
    {"hidden_act": "transformers' GPT-OSS does not read it"},
    tasks=(*_DECODER, "token-classification"),
    refused=(*LLAMA.refused[1:], _FEW, ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention")),
    excused={"sdpa": "JAX's own attention has no sinks and is refused (tests/layers)"},
)

MIXTURES = (_QWEN2_MOE, _QWEN3_MOE, _OLMOE, _GRANITEMOE, _PHIMOE, _GPT_OSS)
