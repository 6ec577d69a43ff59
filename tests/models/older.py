"""The entries of older decoders: fused files, learned positions and ALiBi, blocks side by side and norms behind."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, rope
from tests.models.table import SUFFIXES, Family, Variant

TASKS = ("base", "causal-lm", "sequence-classification", "question-answering")
TAGGER = (*TASKS, "token-classification")
_TINY = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_SHARED = ("vocab_size", "num_attention_heads", "tie_word_embeddings", "output_hidden_states", "output_attentions",
           "pad_token_id", "num_hidden_layers")  # fmt: skip
_INERT = {name: reason for name, reason in LLAMA.inert.items() if name != "pretraining_tp"}
_TRAINING = "of training: test_dropout_is_active_in_training_only"
_READS_PADDING = {
    "question-answering": "padding has logits, too, and they depend on where padding is said to stand",
}
_PARTIAL = rope("default", partial_rotary_factor=0.5)
_WIDER = {"hidden_size": {"hidden_size": 48}}  # half a head of ten would be odd
_ROPE = {
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 1.0}},
    "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
}


def entry(
    name: str,
    prefix: str,
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    *,
    tasks: tuple[str, ...] = TAGGER,
    shared: tuple[str, ...] = _SHARED,
    inert: dict[str, str],
    without: tuple[str, ...] = (),
    **options: Any,
) -> Family:
    """Make an entry; `without`: what Llama's has no effect by, and the family's config has not, or reads."""
    return Family(
        name,
        {task: prefix + SUFFIXES[task] for task in tasks},
        _TINY | config,
        variants,
        {field: LLAMA.fields[field] for field in shared} | fields,
        {field: reason for field, reason in _INERT.items() if field not in without} | inert,
        **options,
    )


_NEOX = entry(
    "gpt_neox",
    "GPTNeoX",
    {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    | _PARTIAL,
    (
        Variant("parallel"),
        Variant(
            "sequential_tied_plain",
            {"use_parallel_residual": False, "attention_bias": False} | _TIED | rope("default"),
            proofs={"gradients", "files"},
        ),
    ),
    {
        **_WIDER,
        **_ROPE,
        "intermediate_size": {"intermediate_size": 48},
        "hidden_act": {"hidden_act": "tanh"},
        "layer_norm_eps": {"layer_norm_eps": 0.5},
        "use_parallel_residual": {"use_parallel_residual": False},
        "attention_bias": {"attention_bias": False},
    },
    inert={
        "hidden_dropout": _TRAINING,
        "classifier_dropout": "of training, before the classifier",
        "is_decoder": "transformers' model does not read it",
    },
    dropout=("attention_dropout", "hidden_dropout"),
    reads_padding=_READS_PADDING,
    refused=((rope("axial"), "axial"), ({"hidden_act": "snake"}, "not supported")),
)

_OPT = entry(
    "opt",
    "OPT",
    {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    (
        Variant("norms_first"),
        Variant(
            "norms_behind_projected_tied",
            {"do_layer_norm_before": False, "word_embed_proj_dim": 24} | _TIED,
            proofs={"base", "embeds", "gradients", "cache", "files"},
        ),
    ),
    {
        "hidden_size": {"hidden_size": 40},
        "ffn_dim": {"ffn_dim": 40},
        "max_position_embeddings": {"max_position_embeddings": 48},
        "activation_function": {"activation_function": "tanh"},
        "word_embed_proj_dim": {"word_embed_proj_dim": 24},
        "do_layer_norm_before": {"do_layer_norm_before": False},
        "_remove_final_layer_norm": {"_remove_final_layer_norm": True},
        "enable_bias": {"enable_bias": False},
        "layer_norm_elementwise_affine": {"layer_norm_elementwise_affine": False},
    },
    tasks=TASKS,
    inert={
        "dropout": _TRAINING,
        "layerdrop": "other values than 0 are refused when a model is built",
        "init_std": "of new weights: test_fresh_weights_follow_initializer_range",
    },
    without=("initializer_range",),
    dropout=("attention_dropout", "dropout"),
    cancelled=("k_proj.bias",),
    deviation="init_std",
    refused=(({"layerdrop": 0.1}, "layerdrop"), ({"num_attention_heads": 3}, "must divide")),
)

_GPTJ = entry(
    "gptj",
    "GPTJ",
    {"n_embd": 32, "n_inner": 48, "num_hidden_layers": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    (
        Variant("untied"),
        Variant("whole_heads_tied", {"rotary_dim": 8, "n_inner": None} | _TIED, proofs={"gradients", "files"}),
    ),
    {
        "n_embd": {"n_embd": 40},
        "n_layer": {"num_hidden_layers": 3},
        "n_head": {"n_head": 2},
        "n_inner": {"n_inner": 40},
        "rotary_dim": {"rotary_dim": 6},
        "activation_function": {"activation_function": "tanh"},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
    },
    tasks=TASKS,
    shared=tuple(name for name in _SHARED if not name.startswith("num_")),
    inert={
        "n_positions": "of transformers' table of sines, which are computed here for any position",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _TRAINING),
    },
    without=("attention_dropout",),
    dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    reads_padding=_READS_PADDING,
    refused=(({"rotary_dim": 10}, "rotary_dim=10"), ({"rotary_dim": 3}, "even"), ({"n_head": 3}, "must divide")),
)

_BLOOM = entry(
    "bloom",
    "Bloom",
    {"hidden_size": 32, "num_hidden_layers": 2, "n_head": 4},
    (
        Variant("untied"),
        Variant(
            "normed_residual_six_heads_tied",
            {"apply_residual_connection_post_layernorm": True, "n_head": 6, "hidden_size": 36} | _TIED,
            proofs={"padding", "gradients", "files", "cache"},
        ),
    ),
    {
        "hidden_size": {"hidden_size": 40},
        "n_layer": {"num_hidden_layers": 3},
        "n_head": {"n_head": 2},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
        "apply_residual_connection_post_layernorm": {"apply_residual_connection_post_layernorm": True},
    },
    shared=tuple(name for name in _SHARED if not name.startswith("num_")),
    inert={
        "hidden_dropout": _TRAINING,
        "slow_but_exact": "True is refused when a model is built, unless pretraining_tp is 1: then it does nothing",
        "pretraining_tp": "of slow_but_exact",
    },
    dropout=("attention_dropout", "hidden_dropout"),
    excused={"positions": "transformers' BLOOM takes no positions: its biases count the tokens"},
    refused=(({"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"), ({"n_head": 3}, "must divide")),
)

_TWICE = "where transformers computes weights, it adds ALiBi's biases twice"
_NEW = {"new_decoder_architecture": True}
_FALCON = entry(
    "falcon",
    "Falcon",
    {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    | rope("default"),
    (
        Variant("multi_query"),
        Variant("new_decoder_tied", _NEW | {"num_kv_heads": 2} | _TIED, proofs={"gradients", "files", "cache"}),
        Variant(
            "alibi_sequential_biases",
            {
                "alibi": True,
                "parallel_attn": False,
                "multi_query": False,
                "bias": True,
                "num_attention_heads": 6,
                "hidden_size": 36,
            },
            proofs={"padding", "gradients", "cache"},
            excused={"attentions": _TWICE},
            attention="sdpa",
        ),
    ),
    {
        "hidden_size": {"hidden_size": 40},
        "ffn_hidden_size": {"ffn_hidden_size": 40},
        "activation": {"activation": "tanh"},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
        "rope_parameters": LLAMA.fields["rope_parameters"],
        "max_position_embeddings": LLAMA.fields["max_position_embeddings"],
        "new_decoder_architecture": _NEW,
        "num_ln_in_parallel_attn": _NEW | {"num_ln_in_parallel_attn": 1},
        "num_kv_heads": _NEW | {"num_kv_heads": 2},
        "multi_query": {"multi_query": False},
        "parallel_attn": {"parallel_attn": False},
        "bias": {"bias": True},
    },
    inert={
        "hidden_dropout": _TRAINING,
        "attention_dropout": "of training, with alibi or without parallel_attn",
        "alibi": f"compared in a variant of its own: {_TWICE}",
    },
    dropout=("hidden_dropout",),
    reads_padding=_READS_PADDING,
    refused=(
        (rope("axial"), "axial"),
        ({"num_attention_heads": 3}, "must divide"),
        (_NEW | {"parallel_attn": False}, "parallel_attn"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        (_NEW | {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3"),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads=2"),
        (_NEW | {"num_kv_heads": 3}, "num_key_value_heads=3"),
    ),
)

OLDER = (_NEOX, _OPT, _GPTJ, _BLOOM, _FALCON)
