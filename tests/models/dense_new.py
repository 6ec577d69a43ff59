"""The entries of newer dense decoders: OLMo and OLMo 3, Cohere's, GLM's."""

from __future__ import annotations

from typing import Any

from tests.models.dense_more import TAGGER, entry
from tests.models.llama import LLAMA, YARN, rope
from tests.models.table import Variant

_LENGTH = {"max_position_embeddings": LLAMA.fields["max_position_embeddings"]}
_ACT = {"hidden_act": {"hidden_act": "tanh"}}
_BIAS = {"attention_bias": {"attention_bias": True}}
_EPSILON = {"rms_norm_eps": {"rms_norm_eps": 0.5}}
_UNTIED = {"tie_word_embeddings": False, "pad_token_id": None}
_TIED = {"tie_word_embeddings": True}
_NO_WINDOW = ({"sliding_window": None}, "sliding_window")
_OTHER_KIND = ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention")
_WINDOW_WITH_GAPS = {"gaps": "its window counts places, those of masked tokens included, as transformers' does"}

_OLMO = entry(
    "olmo",
    "Olmo",
    {"pad_token_id": None, "clip_qkv": 1.0},
    (
        Variant("clipped"),
        Variant("tied_biases", {**_TIED, "attention_bias": True, "clip_qkv": None}),
    ),
    {**_LENGTH, **_ACT, **_BIAS, "clip_qkv": {"clip_qkv": 0.5}},
    tasks=TAGGER[:3],
)


def _ropes(full: float, sliding: float, kind: str = "default", **parameters: float) -> dict[str, Any]:
    of_kinds = {
        "full_attention": rope(kind, **parameters)["rope_parameters"] | {"rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }
    return {"rope_parameters": of_kinds}


_KINDS = ["sliding_attention", "full_attention"]
_SLIDING = {
    "sliding_window": {"sliding_window": 3},
    "layer_types": {"layer_types": _KINDS[::-1]},
}

_OLMO3 = entry(
    "olmo3",
    "Olmo3",
    {"pad_token_id": None, "sliding_window": 6, "layer_types": _KINDS, **_ropes(1000.0, 30.0)},
    (
        Variant("gqa", excused=_WINDOW_WITH_GAPS),
        Variant(
            "legacy_yarn_tied_biases_full",
            {**_TIED, "num_key_value_heads": 4, "attention_bias": True, "layer_types": ["full_attention"] * 2},
            legacy={"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 500.0},  # full layers alone scale
            proofs={"gaps"},
        ),
    ),
    {
        **_EPSILON,
        **_ACT,
        **_BIAS,
        **_SLIDING,
        "num_hidden_layers": {"num_hidden_layers": 3, "layer_types": [*_KINDS, "sliding_attention"]},
        "max_position_embeddings": {"max_position_embeddings": 32} | _ropes(1000.0, 30.0, "dynamic", factor=4.0),
        "rope_parameters": _ropes(3.0, 1000.0),
    },
    tasks=TAGGER[:3],
    refused=(LLAMA.refused[0], LLAMA.refused[2], _OTHER_KIND, _NO_WINDOW),
)

_COHERE_FIELDS = {
    **_LENGTH,
    **_ACT,
    **_BIAS,
    "layer_norm_eps": {"layer_norm_eps": 0.5},
    "logit_scale": {"logit_scale": 0.8},
}

_COHERE = entry(
    "cohere",
    "Cohere",
    {**_UNTIED, "logit_scale": 0.3},
    (
        Variant("untied"),
        Variant("normed_tied_biases", {**_TIED, "use_qk_norm": True, "attention_bias": True}, proofs={"sharding"}),
    ),
    {**_COHERE_FIELDS, "use_qk_norm": {"use_qk_norm": True}},
    tasks=TAGGER[:2],
)

_COHERE2 = entry(
    "cohere2",
    "Cohere2",
    {**_UNTIED, "logit_scale": 0.3, "sliding_window": 6, "sliding_window_pattern": 2},
    (
        Variant("untied", excused=_WINDOW_WITH_GAPS),
        Variant(
            "tied_biases_full",
            {**_TIED, "attention_bias": True, "layer_types": ["full_attention"] * 2},
            proofs={"gaps"},
        ),
    ),
    {**_COHERE_FIELDS, **_SLIDING},
    tasks=TAGGER[:2],
    refused=(*LLAMA.refused, _OTHER_KIND, _NO_WINDOW),
)

# Where a missing factor is filled in, it must be given to be found again.
_PARTIAL = {
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 1.0}},
    "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
    "head_dim": {"head_dim": 12},
}
_GLM, _GLM4 = (
    entry(
        name,
        prefix,
        {"pad_token_id": None, "head_dim": 8, "attention_bias": False, **rope("default", partial_rotary_factor=0.5)},
        (
            Variant("untied"),
            Variant(
                "legacy_tied_biases",
                {**_TIED, "attention_bias": True, "num_key_value_heads": 1},
                legacy={"rope_theta": 77.0, "partial_rotary_factor": 0.25},
            ),
        ),
        {**_EPSILON, **_ACT, **_BIAS, **_PARTIAL},
    )
    for name, prefix in (("glm", "Glm"), ("glm4", "Glm4"))
)

DENSE_NEW = (_OLMO, _OLMO3, _COHERE, _COHERE2, _GLM, _GLM4)
