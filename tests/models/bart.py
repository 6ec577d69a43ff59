"""BART's entry in the table."""

from __future__ import annotations

from tests.models.t5 import T5
from tests.models.table import Family, Variant

_TRAINING = "of training: test_dropout_is_active_in_training_only"
_NEEDS_ENDS = "its classifier needs an end of text in each row: tests/models/test_bart.py"
_OF_T5 = ("transformers_version", "architectures", "return_dict", "dtype", "is_encoder_decoder", "use_cache")

BART = Family(
    name="bart",
    theirs={
        "base": "BartModel",
        "seq2seq": "BartForConditionalGeneration",
        "sequence-classification": "BartForSequenceClassification",
        "question-answering": "BartForQuestionAnswering",
    },
    main_task="seq2seq",
    config={
        "vocab_size": 96,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "decoder_ffn_dim": 40,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": None,
    },
    variants=(
        Variant("gelu"),
        Variant(
            "scaled",
            {
                "scale_embedding": True,
                "activation_function": "relu",
                "decoder_layers": 1,
                "decoder_start_token_id": 5,
                "pad_token_id": None,
                "forced_eos_token_id": None,
            },
            proofs={"gradients", "generate", "files", "padding_token"},
        ),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "d_model": {"d_model": 40},
        "encoder_layers": {"encoder_layers": 3},
        "encoder_ffn_dim": {"encoder_ffn_dim": 40},
        "encoder_attention_heads": {"encoder_attention_heads": 2},
        "decoder_layers": {"decoder_layers": 1},
        "decoder_ffn_dim": {"decoder_ffn_dim": 56},
        "decoder_attention_heads": {"decoder_attention_heads": 4},
        "max_position_embeddings": {"max_position_embeddings": 48},
        "activation_function": {"activation_function": "tanh"},
        "scale_embedding": {"scale_embedding": True},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={name: T5.inert[name] for name in _OF_T5}
    | {
        "chunk_size_feed_forward": "transformers' BART does not read it",
        "id2label": "of classification: tests/models/test_bart.py",
        "label2id": "of classification: tests/models/test_bart.py",
        "problem_type": "of classification",
        "classifier_dropout": "of training, before a classifier: tests/models/test_bart.py",
        "is_decoder": "each side is told which it is, whatever the config says",
        "dropout": _TRAINING,
        "attention_dropout": _TRAINING,
        "activation_dropout": _TRAINING,
        "encoder_layerdrop": "another than 0 is refused when the model is built",
        "decoder_layerdrop": "another than 0 is refused when the model is built",
        "tie_word_embeddings": "False is refused when the model is built",
        "init_std": "of new weights: test_fresh_weights_follow_initializer_range",
        "decoder_start_token_id": "of shifted labels and generation: tests/models/test_parity_seq2seq.py",
        "bos_token_id": "of tokenizers: the model reads it nowhere",
        "eos_token_id": "of generation: test_end_of_text; of classification: tests/models/test_bart.py",
        "forced_eos_token_id": "of generation: tests/models/test_bart.py",
    },
    excused={
        "positions": "BART takes no position_ids",
        "tasks": _NEEDS_ENDS,
        "left_padding": _NEEDS_ENDS,
        "segments": T5.excused["segments"],
        "gaps": "the proof continues input_ids, which are the encoder's: tests/models/test_bart.py",
    },
    dropout=("dropout", "attention_dropout", "activation_dropout"),
    deviation="init_std",
    # So that what it writes depends on where: a token that is its own likeliest successor is written for ever.
    factors={
        "embed_positions.weight": 12,
        "self_attn.out_proj.weight": 0.3,
        "encoder_attn.out_proj.weight": 0.3,
        "fc2.weight": 0.3,
        ".bias": 0.3,
    },
    cancelled=("attn.k_proj.bias",),
    pads_right=True,
    refused=(
        ({"activation_function": "snake"}, "not supported"),
        ({"encoder_attention_heads": 3}, "encoder_attention_heads=3 must divide"),
        ({"decoder_attention_heads": 3}, "decoder_attention_heads=3 must divide"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported by BART"),
    ),
)
