"""The entries of ERNIE 4.5, Helium, Seed-OSS, Nemotron and EXAONE 4."""

from __future__ import annotations

from tests.models.dense_more import TAGGER, entry
from tests.models.llama import LLAMA, rope
from tests.models.table import Variant

_LENGTH = {"max_position_embeddings": LLAMA.fields["max_position_embeddings"]}
_EPSILON = {"rms_norm_eps": {"rms_norm_eps": 0.5}}
_ACT = {"hidden_act": {"hidden_act": "tanh"}}
_HEAD = {"head_dim": {"head_dim": 6}}
_BIASES = {"attention_bias": {"attention_bias": True}, "mlp_bias": {"mlp_bias": True}}
_UNREAD = "transformers' model does not read it"
_TRAINING = "of training: test_dropout_is_active_in_training_only"
_ANSWERS = {
    "question-answering": "padding has logits, too, and they depend on where padding is said to stand",
}
_NO_WINDOW = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
_WINDOW_WITH_GAPS = {"gaps": "its window counts places, those of masked tokens included, as transformers' does"}

_ERNIE4_5 = entry(
    "ernie4_5",
    "Ernie4_5",
    {"tie_word_embeddings": False, "head_dim": 8},
    (
        Variant("untied"),
        Variant("tied_biases", {"tie_word_embeddings": True, "use_bias": True}, proofs={"gradients", "cache"}),
    ),
    {**_LENGTH, **_EPSILON, **_ACT, **_HEAD, "use_bias": {"use_bias": True}},
    tasks=TAGGER[:2],
    dropout=(),
    excused={"dropout": "transformers' model has no dropout"},
)

_HELIUM = entry(
    "helium",
    "Helium",
    {"head_dim": 8},
    (
        Variant("untied"),
        Variant(
            "tied_biases",
            {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            proofs={"gradients"},
        ),
    ),
    {
        **_LENGTH,
        **_EPSILON,
        **_ACT,
        **_BIASES,
        # The heads make up the model's width.
        "hidden_size": {"hidden_size": 40, "head_dim": 10},
        "num_attention_heads": {"num_attention_heads": 2, "head_dim": 16},
        "head_dim": {"head_dim": 4, "num_attention_heads": 8},
    },
    refused=(*LLAMA.refused, ({"head_dim": 6}, "hidden_size=32")),
)

_SEED_OSS = entry(
    "seed_oss",
    "SeedOss",
    {"head_dim": 8},
    (
        Variant("biases_of_qkv"),
        Variant(
            "tied_other_biases",
            {
                "tie_word_embeddings": True,
                "attention_bias": False,
                "attention_out_bias": True,
                "mlp_bias": True,
                "head_dim": 12,
            },
            proofs={"gradients"},
        ),
    ),
    {
        **_LENGTH,
        **_EPSILON,
        **_ACT,
        **_HEAD,
        "attention_bias": {"attention_bias": False},
        "attention_out_bias": {"attention_out_bias": True},
        "mlp_bias": {"mlp_bias": True},
    },
    tasks=(*TAGGER, "question-answering"),
    reads_padding=_ANSWERS,
    inert={"pretraining_tp": _UNREAD, "residual_dropout": _TRAINING},
    dropout=("attention_dropout", "residual_dropout"),
)

_NEMOTRON = entry(
    "nemotron",
    "Nemotron",
    rope("default", partial_rotary_factor=0.5),
    (
        Variant("untied"),
        Variant(
            "tied_biases_whole_heads",
            rope("default", partial_rotary_factor=1.0)
            | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
            proofs={"gradients", "cache"},
        ),
    ),
    {
        **_ACT,
        **_BIASES,
        # Where a missing factor is filled in, it must be given to be found again.
        "rope_parameters": rope("default", partial_rotary_factor=1.0),
        "max_position_embeddings": {"max_position_embeddings": 32}
        | rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
        "hidden_size": {"hidden_size": 48},  # half a head of ten would be odd
        "head_dim": {"head_dim": 12},
        "norm_eps": {"norm_eps": 0.5},
    },
    tasks=(*TAGGER, "question-answering"),
    reads_padding=_ANSWERS,
)

_EXAONE4 = entry(
    "exaone4",
    "Exaone4",
    {"sliding_window": 6, "sliding_window_pattern": 2},
    (
        Variant("sliding_and_full", excused=_WINDOW_WITH_GAPS),
        Variant(
            "tied_no_window",
            {**_NO_WINDOW, "tie_word_embeddings": True, "head_dim": 12},
            proofs={"gaps", "cache", "gradients"},
        ),
    ),
    {
        **_LENGTH,
        **_EPSILON,
        **_ACT,
        "sliding_window": {"sliding_window": 3},
        "sliding_window_pattern": {"sliding_window_pattern": 3},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    },
    tasks=(*TAGGER, "question-answering"),
    reads_padding=_ANSWERS,
    refused=(
        *LLAMA.refused,
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window is None"),
        ({"sliding_window_pattern": "LG"}, "sliding_window_pattern='LG'"),
    ),
)

DENSE_MID = (_ERNIE4_5, _HELIUM, _SEED_OSS, _NEMOTRON, _EXAONE4)
