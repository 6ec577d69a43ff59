"""Llama's entry in the table."""

from __future__ import annotations

from typing import Any

from tests.models.table import Family, Variant


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 3.5, 6.0],
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_CROSSING = {"lengths": (12, 24), "proofs": {"padding", "generate"}}

_VARIANTS = (
    Variant("gqa"),
    Variant("mha", {"num_key_value_heads": 4}, thorough=True, proofs={"sharding"}),
    Variant("mqa", {"num_key_value_heads": 1}, proofs={"generate"}),
    Variant("attention_bias", {"attention_bias": True}, proofs={"generate"}),
    Variant("mlp_bias", {"mlp_bias": True}),
    Variant(
        "tied",
        {"tie_word_embeddings": True, "pad_token_id": 0},
        thorough=True,
        proofs={"sharding", "bfloat16"},
    ),
    Variant(
        "head_dim",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
        thorough=True,
        proofs={"sharding"},
    ),
    Variant("gelu", {"hidden_act": "gelu"}),
    Variant("gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}),
    Variant("relu", {"hidden_act": "relu"}),
    Variant("norm_eps", {"rms_norm_eps": 0.1}),
    Variant("theta", rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    Variant("twelve_layers", {"num_hidden_layers": 12}),
    Variant("linear", rope("linear", factor=4.0), proofs={"generate"}),
    Variant("dynamic", rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}, **_CROSSING),
    Variant("yarn", rope("yarn", **YARN), thorough=True),
    Variant("yarn_mscale", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3)),
    Variant("yarn_mscale_alone", rope("yarn", **YARN, mscale=0.7)),
    Variant("yarn_attention_factor", rope("yarn", **YARN, attention_factor=1.4)),
    Variant("yarn_truncate", rope("yarn", **YARN, truncate=False)),
    Variant("yarn_betas", rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.5)),
    Variant("yarn_no_factor", rope("yarn", factor=None, original_max_position_embeddings=16)),
    Variant("longrope", rope("longrope", **_LONG), **_CROSSING),
    Variant("longrope_factor", rope("longrope", **_LONG, factor=6.0), lengths=(12, 24), proofs={"padding"}),
    Variant(
        "longrope_attention_factor",
        rope("longrope", **_LONG, attention_factor=1.4),
        lengths=(12, 24),
        proofs={"padding"},
    ),
    Variant("llama3", rope("llama3", **_LLAMA3), thorough=True),
    Variant("legacy_linear", legacy={"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}),
    Variant(
        "legacy_llama3",
        legacy={"rope_scaling": {"rope_type": "llama3", **_LLAMA3}, "rope_theta": 500.0},
        proofs={"generate"},
    ),
    Variant("legacy_theta", legacy={"rope_scaling": None, "rope_theta": 77.0}),
)

LLAMA = Family(
    name="llama",
    theirs={
        "base": "LlamaModel",
        "causal-lm": "LlamaForCausalLM",
        "sequence-classification": "LlamaForSequenceClassification",
    },
    config={
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        **rope("default"),
    },
    variants=_VARIANTS,
    fields={
        "vocab_size": {"vocab_size": 104},
        "hidden_size": {"hidden_size": 40},
        "intermediate_size": {"intermediate_size": 40},
        "num_hidden_layers": {"num_hidden_layers": 3},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads": {"num_key_value_heads": 4},
        "hidden_act": {"hidden_act": "tanh"},
        "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0),
        "rms_norm_eps": {"rms_norm_eps": 0.5},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "head_dim": {"head_dim": 6},
        "partial_rotary_factor": rope("default", partial_rotary_factor=0.5),
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={
        "transformers_version": "names the writer",
        "architectures": "names the writer's class",
        "return_dict": "outputs are always objects here",
        "dtype": "of the stored weights: chosen while loading (tests/hub)",
        "chunk_size_feed_forward": "transformers' Llama does not read it",
        "is_encoder_decoder": "transformers' Llama does not read it",
        "id2label": "its length is num_labels: classification tests",
        "label2id": "names only",
        "problem_type": "of the classification loss: classification tests",
        "initializer_range": "of new weights: test_fresh_weights_follow_initializer_range",
        "use_cache": "a cache is used where one is given",
        "bos_token_id": "read by tokenizers",
        "eos_token_id": "of generation: tests/generation",
        "pretraining_tp": "transformers' Llama does not read it any more",
        "attention_dropout": "of training: test_dropout_is_active_in_training_only",
    },
    refused=(
        ({"hidden_act": "snake"}, "not supported"),
        (rope("axial"), "axial"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ),
)
