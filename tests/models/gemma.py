"""The entries of Gemma and Gemma 3; Gemma 2's stands among those that vary Llama."""

from __future__ import annotations

from tests.models.dense_more import TAGGER, entry
from tests.models.llama import LLAMA, rope
from tests.models.table import Variant

_COMMON = {
    "max_position_embeddings": LLAMA.fields["max_position_embeddings"],
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "head_dim": {"head_dim": 6},
    "attention_bias": {"attention_bias": True},
}
_TWO_WAYS = ({"use_bidirectional_attention": True}, "use_bidirectional_attention")
_REFUSED = {"use_bidirectional_attention": "True is refused when the model is built"}

# Scales of one, as the tests give them to norms, are of size two here: products of queries and keys would be four times
# as large as elsewhere, and rounding with them.
_PLAIN_PRODUCTS = {"q_proj.weight": 0.25}

_GEMMA = entry(
    "gemma",
    "Gemma",
    {"head_dim": 12, "pad_token_id": None, "tie_word_embeddings": False},
    (
        Variant("untied"),
        Variant("tied_biases", {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1}),
    ),
    {**_COMMON, "hidden_act": {"hidden_act": "tanh"}},
    refused=(*LLAMA.refused, _TWO_WAYS),
    inert=_REFUSED,
    factors=_PLAIN_PRODUCTS,
)


def _ropes(full: float, sliding: float, kind: str = "default", **parameters: float) -> dict[str, object]:
    of_kinds = {
        "full_attention": rope(kind, **parameters)["rope_parameters"] | {"rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }
    return {"rope_parameters": of_kinds}


_GEMMA3 = entry(
    "gemma3_text",
    "Gemma3Text",
    {
        "head_dim": 8,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "sliding_window": 6,
        "sliding_window_pattern": 2,  # the first layer is sliding, the second full
        "query_pre_attn_scalar": 100,
        **_ropes(1000.0, 30.0),
    },
    (
        Variant(
            "untied",
            excused={"gaps": "its window counts places, those of masked tokens included, as transformers' does"},
        ),
        Variant(
            "tied_biases_capped",
            {
                "tie_word_embeddings": True,
                "attention_bias": True,
                "final_logit_softcapping": 5.0,
                "layer_types": ["full_attention"] * 2,
                **_ropes(1000.0, 30.0, "linear", factor=4.0),
            },
            proofs={"gaps"},
        ),
    ),
    {
        **_COMMON,
        "max_position_embeddings": {"max_position_embeddings": 32} | _ropes(1000.0, 30.0, "dynamic", factor=4.0),
        "hidden_activation": {"hidden_activation": "tanh"},
        "rope_parameters": _ropes(3.0, 1000.0),
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 5},
        "sliding_window": {"sliding_window": 3},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
        "final_logit_softcapping": {"final_logit_softcapping": 5.0},
    },
    tasks=TAGGER[:3],
    theirs={"causal-lm": "Gemma3ForCausalLM"},
    refused=(
        ({"hidden_activation": "snake"}, "not supported"),
        LLAMA.refused[2],
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        _TWO_WAYS,
    ),
    inert={**_REFUSED, "attn_logit_softcapping": "transformers' Gemma 3 keeps it and applies it nowhere"},
)

GEMMAS = (_GEMMA, _GEMMA3)
