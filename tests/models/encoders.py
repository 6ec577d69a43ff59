"""The entries of the encoders besides BERT."""

from __future__ import annotations

from tests.models.bert import BERT
from tests.models.table import Family, Variant

_TASKS = {
    "base": "Model",
    "masked-lm": "ForMaskedLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "embedding": "Model",
}
_FIRST = "transformers' classifier reads the first place of a row, which is padding in one padded left"


def _theirs(prefix: str) -> dict[str, str]:
    return {task: prefix + suffix for task, suffix in _TASKS.items()}


ROBERTA = Family(
    name="roberta",
    theirs=_theirs("Roberta"),
    ours={"embedding": "RobertaForEmbedding"},
    main_task="masked-lm",
    config={**BERT.config, "pad_token_id": 0, "layer_norm_eps": 1e-5},
    variants=(
        Variant("tied"),
        Variant(
            "untied",
            {
                "tie_word_embeddings": False,
                "pad_token_id": 1,
                "num_attention_heads": 1,
                "type_vocab_size": 1,
                "hidden_act": "relu",
                "layer_norm_eps": 0.1,
                "chunk_size_feed_forward": 1,
            },
            proofs={"padding", "gradients", "files", "padding_token"},
        ),
    ),
    fields={**BERT.fields, "pad_token_id": {"pad_token_id": 3}},
    inert={**BERT.inert, "chunk_size_feed_forward": "says how transformers computes an MLP: the variant untied"},
    dropout=BERT.dropout,
    new_in_base=BERT.new_in_base,
    cancelled=BERT.cancelled,
    excused={"left_padding": _FIRST},
    refused=(
        ({"hidden_act": "snake"}, "not supported"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide"),
        ({"is_decoder": True}, "is_decoder=True is not supported by ROBERTA"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"pad_token_id": None}, "positions begin after pad_token_id"),
    ),
)

_DISTILBERT_ONLY = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "is_decoder")

DISTILBERT = Family(
    name="distilbert",
    theirs=_theirs("DistilBert"),
    ours={"embedding": "DistilBertForEmbedding"},
    main_task="masked-lm",
    config={
        "vocab_size": 96,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
    variants=(
        Variant("tied"),
        Variant(
            "untied",
            {
                "tie_word_embeddings": False,
                "pad_token_id": None,
                "n_heads": 1,
                "activation": "relu",
                "sinusoidal_pos_embds": True,
                "chunk_size_feed_forward": 1,
            },
            proofs={"gradients", "files", "padding_token"},
        ),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "dim": {"dim": 40},
        "hidden_dim": {"hidden_dim": 40},
        "n_layers": {"n_layers": 3},
        "n_heads": {"n_heads": 2},
        "activation": {"activation": "tanh"},
        "max_position_embeddings": {"max_position_embeddings": 48},
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={name: reason for name, reason in BERT.inert.items() if name not in _DISTILBERT_ONLY}
    | {
        "chunk_size_feed_forward": "says how transformers computes an MLP: the variant untied",
        "sinusoidal_pos_embds": "of new weights: tests/models/test_encoders.py",
        "dropout": "of training: test_dropout_is_active_in_training_only",
        "attention_dropout": "of training: test_dropout_is_active_in_training_only",
        "qa_dropout": "of training: tests/models/test_encoders.py",
        "seq_classif_dropout": "of training: tests/models/test_encoders.py",
    },
    dropout=("dropout", "attention_dropout"),
    cancelled=("attention.k_lin.bias",),
    excused={
        "left_padding": f"{_FIRST}; its positions count padding",
    },
    refused=(
        ({"activation": "snake"}, "not supported"),
        ({"n_heads": 3}, "n_heads=3 must divide"),
    ),
)


def _ropes(full: dict[str, object], sliding: float = 30.0) -> dict[str, object]:
    near = {"rope_type": "default", "rope_theta": sliding}
    return {"rope_parameters": {"full_attention": {"rope_theta": 1000.0, **full}, "sliding_attention": near}}


_GPU = "of a kernel for GPUs that transformers may use: the numbers are the same"
_TOKENIZER = "of tokenizers: the model reads it nowhere"
_TRAINING = "of training: test_dropout_is_active_in_training_only"
_SHARED = (
    "transformers_version",
    "architectures",
    "return_dict",
    "dtype",
    "is_encoder_decoder",
    "id2label",
    "label2id",
)

MODERNBERT = Family(
    name="modernbert",
    theirs=_theirs("ModernBert"),
    ours={"embedding": "ModernBertForEmbedding"},
    main_task="masked-lm",
    config={
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "local_attention": 9,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        **_ropes({"rope_type": "default"}),
    },
    variants=(
        Variant("tied"),
        Variant(
            "biased",
            {
                "tie_word_embeddings": False,
                "pad_token_id": None,
                "num_attention_heads": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "attention_bias": True,
                "mlp_bias": True,
                "norm_bias": True,
                "classifier_bias": True,
                "classifier_activation": "relu",
                "hidden_activation": "silu",
                **_ropes({"rope_type": "linear", "factor": 4.0}),
            },
            proofs={"gradients", "files", "padding", "padding_token"},
        ),
        Variant("legacy_thetas", legacy={"global_rope_theta": 500.0, "local_rope_theta": 20.0}),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "hidden_size": {"hidden_size": 40},
        "intermediate_size": {"intermediate_size": 40},
        "num_hidden_layers": {"num_hidden_layers": 3},
        "num_attention_heads": {"num_attention_heads": 2},
        "hidden_activation": {"hidden_activation": "tanh"},
        "max_position_embeddings": {"max_position_embeddings": 32} | _ropes({"rope_type": "dynamic", "factor": 4.0}),
        "norm_eps": {"norm_eps": 0.5},
        "norm_bias": {"norm_bias": True},
        "attention_bias": {"attention_bias": True},
        "layer_types": {"layer_types": ["sliding_attention", "full_attention"]},
        "rope_parameters": _ropes({"rope_type": "default"}, 1000.0),
        "local_attention": {"local_attention": 4},
        "mlp_bias": {"mlp_bias": True},
        "decoder_bias": {"decoder_bias": False},
        "classifier_bias": {"classifier_bias": True},
        "classifier_activation": {"classifier_activation": "tanh"},
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={name: BERT.inert[name] for name in _SHARED}
    | {
        "problem_type": BERT.inert["problem_type"],
        "chunk_size_feed_forward": "transformers' ModernBERT does not read it",
        "classifier_pooling": "of sequence classification: tests/models/test_encoders.py",
        "classifier_dropout": "of training: tests/models/test_encoders.py",
        "attention_dropout": _TRAINING,
        "embedding_dropout": _TRAINING,
        "mlp_dropout": _TRAINING,
        "initializer_range": "of new weights: test_fresh_weights_follow_initializer_range",
        "initializer_cutoff_factor": "of new weights: tests/models/test_encoders.py",
        "deterministic_flash_attn": _GPU,
        "sparse_prediction": "True is refused when the model is built",
        "sparse_pred_ignore_index": "of sparse_prediction, which is refused",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), _TOKENIZER),
    },
    dropout=("attention_dropout", "embedding_dropout", "mlp_dropout"),
    excused={"left_padding": f"{_FIRST}; its positions count padding"},
    refused=(
        ({"hidden_activation": "snake"}, "not supported"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide"),
        ({"sparse_prediction": True}, "sparse_prediction=True"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
    ),
)

ENCODERS = (ROBERTA, DISTILBERT, MODERNBERT)
