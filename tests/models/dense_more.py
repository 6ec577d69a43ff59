"""The entries of more dense decoders: other norms, partial rotation, fused files, blocks side by side."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, rope
from tests.models.table import SUFFIXES, Family, Variant

TAGGER = tuple(SUFFIXES)[:4]
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings", "rope_parameters", "output_hidden_states", "pad_token_id",
)  # fmt: skip
_INERT = {name: reason for name, reason in LLAMA.inert.items() if name != "pretraining_tp"}
_UNREAD = "transformers' model does not read it"
_TRAINING = "of training: test_dropout_is_active_in_training_only"
_LENGTH = {"max_position_embeddings": LLAMA.fields["max_position_embeddings"]}


def entry(
    name: str,
    prefix: str,
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    *,
    tasks: tuple[str, ...] = TAGGER,
    theirs: dict[str, str] | None = None,
    refused: tuple[Any, ...] = LLAMA.refused,
    inert: dict[str, str] | None = None,
    **options: Any,
) -> Family:
    """Make an entry: Llama's tiny config and fields, and what is the family's own."""
    shared = {field: LLAMA.fields[field] for field in _SHARED}
    return Family(
        name,
        {task: prefix + SUFFIXES[task] for task in tasks} | (theirs or {}),
        {**LLAMA.config, **config},
        variants,
        shared | fields,
        _INERT | (inert or {}),
        refused=refused,
        **options,
    )


_BIAS = {"attention_bias": {"attention_bias": True}}
_EPSILON = {"rms_norm_eps": {"rms_norm_eps": 0.5}}
_ACT = {"hidden_act": {"hidden_act": "tanh"}}

# Where a missing factor is filled in, it must be given to be found again.
_PARTIAL = {
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 1.0}},
    "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
}
_WIDER = {"hidden_size": {"hidden_size": 48}}  # half a head of ten would be odd
_SHORT_LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.5, 2.5, 5.0],
}
_PHI3 = entry(
    "phi3",
    "Phi3",
    {"pad_token_id": None},
    (
        Variant("full"),
        Variant(
            "longrope",
            {"rope_parameters": _SHORT_LONG, "original_max_position_embeddings": 16},
            lengths=(12, 24),
            proofs={"padding"},
        ),
        Variant(
            "window_partial_tied",
            {
                **rope("default", partial_rotary_factor=0.5),
                "sliding_window": 6,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            },
            proofs={"cache", "generate"},
        ),
    ),
    {
        **_EPSILON,
        **_ACT,
        **_PARTIAL,
        "max_position_embeddings": {
            "max_position_embeddings": 100,
            "rope_parameters": _SHORT_LONG,
            "original_max_position_embeddings": 16,
        },
        "original_max_position_embeddings": {
            "rope_parameters": _SHORT_LONG | {"original_max_position_embeddings": 32},
            "original_max_position_embeddings": 32,
        },
        "sliding_window": {"sliding_window": 3},
    },
    refused=(LLAMA.refused[0], LLAMA.refused[2]),
    inert={"embd_pdrop": _UNREAD, "resid_pdrop": _TRAINING},
    dropout=("attention_dropout", "resid_pdrop"),
)

_STARCODER2 = entry(
    "starcoder2",
    "Starcoder2",
    {"tie_word_embeddings": False, "sliding_window": None},
    (
        Variant("untied"),
        Variant(
            "window_tied_plain",
            {"sliding_window": 6, "tie_word_embeddings": True, "use_bias": False, "num_key_value_heads": 1},
            proofs={"padding", "cache"},
        ),
    ),
    {
        **_LENGTH,
        **_ACT,
        "norm_epsilon": {"norm_epsilon": 0.5},
        "use_bias": {"use_bias": False},
        "sliding_window": {"sliding_window": 3},
    },
    inert={"residual_dropout": _TRAINING, "embedding_dropout": _TRAINING},
    dropout=("attention_dropout", "residual_dropout", "embedding_dropout"),
)

_OLMO2 = entry(
    "olmo2",
    "Olmo2",
    {"pad_token_id": None},
    (
        Variant("gqa"),
        Variant("mha_tied_biases", {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True}),
    ),
    {**_LENGTH, **_EPSILON, **_ACT, **_BIAS},
    tasks=TAGGER[:3],
)

_FACTORS = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_GRANITE = entry(
    "granite",
    "Granite",
    _FACTORS,
    (
        Variant("untied"),
        Variant("tied_biases", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ),
    {
        **_LENGTH,
        **_EPSILON,
        **_ACT,
        **_BIAS,
        "mlp_bias": {"mlp_bias": True},
        **{name: {name: 0.8} for name in _FACTORS},
    },
    tasks=TAGGER[:2],
)

_SMOLLM3 = entry(
    "smollm3",
    "SmolLM3",
    {"tie_word_embeddings": False, "pad_token_id": None, "no_rope_layer_interval": 2},
    (
        Variant("untied"),
        Variant(
            "sliding_tied_biases",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "tie_word_embeddings": True,
                "attention_bias": True,
                "mlp_bias": True,
            },
            proofs={"padding", "cache"},
        ),
    ),
    {
        **_LENGTH,
        **_EPSILON,
        **_ACT,
        **_BIAS,
        "mlp_bias": {"mlp_bias": True},
        "no_rope_layers": {"no_rope_layers": [0, 0]},
        "no_rope_layer_interval": {"no_rope_layer_interval": 1},
        "use_sliding_window": {"use_sliding_window": True, "sliding_window": 3},
        "sliding_window": {"use_sliding_window": True, "sliding_window": 5},
        "layer_types": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    },
    tasks=(*TAGGER, "question-answering"),
    reads_padding={"question-answering": "padding has logits, too, and they depend on where padding is said to stand"},
    refused=(
        *LLAMA.refused,
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"no_rope_layers": [1], "layer_types": ["full_attention"] * 2}, "no_rope_layers"),
    ),
)

_STABLELM = entry(
    "stablelm",
    "StableLm",
    rope("default", partial_rotary_factor=0.5),
    (
        Variant("sequential"),
        Variant(
            "parallel_normed",
            {
                "use_parallel_residual": True,
                "qk_layernorm": True,
                "use_qkv_bias": True,
                "tie_word_embeddings": True,
            },
            proofs={"gradients", "files", "cache", "sharding"},
        ),
    ),
    {
        **_ACT,
        **_PARTIAL,
        **_WIDER,
        "layer_norm_eps": {"layer_norm_eps": 0.5},
        "use_qkv_bias": {"use_qkv_bias": True},
        "qk_layernorm": {"qk_layernorm": True},
        "use_parallel_residual": {"use_parallel_residual": True},
    },
    refused=(*LLAMA.refused, ({"hidden_size": 34}, "must divide")),
    inert={"hidden_dropout": _TRAINING},
    dropout=("attention_dropout", "hidden_dropout"),
)

_PHI = entry(
    "phi",
    "Phi",
    # A size at which no two tokens are nearly as likely while it generates.
    rope("default", partial_rotary_factor=0.5) | {"intermediate_size": 40},
    (
        Variant("untied"),
        Variant(
            "normed_tied",
            {"qk_layernorm": True, "tie_word_embeddings": True},
            proofs={"gradients", "files"},
        ),
    ),
    {
        **_ACT,
        **_PARTIAL,
        **_WIDER,
        "intermediate_size": {"intermediate_size": 44},
        "layer_norm_eps": {"layer_norm_eps": 0.5},
        "qk_layernorm": {"qk_layernorm": True},
    },
    inert={"resid_pdrop": _TRAINING, "embd_pdrop": _TRAINING},
    dropout=("attention_dropout", "resid_pdrop", "embd_pdrop"),
)

DENSE_MORE = (_PHI3, _STARCODER2, _OLMO2, _GRANITE, _SMOLLM3, _STABLELM, _PHI)
