"""GPT-2's entry in the table."""

from __future__ import annotations

from tests.models.llama import LLAMA
from tests.models.table import Family, Variant

_INERT = ("transformers_version", "architectures", "return_dict", "dtype", "chunk_size_feed_forward",
          "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range", "use_cache",
          "bos_token_id", "eos_token_id")  # fmt: skip
_SUMMARY = "of the double-heads model, which is not offered here"

GPT2 = Family(
    name="gpt2",
    theirs={
        "base": "GPT2Model",
        "causal-lm": "GPT2LMHeadModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
    },
    config={
        "vocab_size": 96,
        "n_positions": 64,
        "n_embd": 64,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    },
    variants=(
        Variant("untied"),
        Variant("tied", {"tie_word_embeddings": True, "n_inner": 80}, thorough=True),
        Variant("by_layer", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_inner": 32}, thorough=True),
        Variant("unscaled", {"scale_attn_weights": False, "activation_function": "relu"}),
        Variant("one_head", {"n_head": 1, "layer_norm_epsilon": 0.1, "reorder_and_upcast_attn": True}),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "n_positions": {"n_positions": 48},
        "n_embd": {"n_embd": 40},
        "n_layer": {"n_layer": 3},
        "n_head": {"n_head": 2},
        "n_inner": {"n_inner": None},
        "activation_function": {"activation_function": "relu"},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
        "scale_attn_weights": {"scale_attn_weights": False},
        "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "output_hidden_states": {"output_hidden_states": True},
    },
    inert={
        **{name: LLAMA.inert[name] for name in _INERT},
        "reorder_and_upcast_attn": "products are taken in float32 here in any case",
        "add_cross_attention": "True is refused when a model is built",
        "resid_pdrop": "of training: the proof of dropout",
        "embd_pdrop": "of training: the proof of dropout",
        "attn_pdrop": "of training: the proof of dropout",
        "pad_token_id": "of classification: which token is last",
        **dict.fromkeys(
            (
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
            ),
            _SUMMARY,
        ),
    },
    counts_padding=True,
    dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    excused={"padding_token": "it has no padding token: all embeddings are trained"},
    refused=(({"add_cross_attention": True}, "add_cross_attention"), ({"n_head": 3}, "n_head")),
)
