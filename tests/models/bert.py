"""BERT's entry in the table."""

from __future__ import annotations

from tests.models.llama import LLAMA
from tests.models.table import Family, Variant

_INERT = ("transformers_version", "architectures", "return_dict", "dtype", "is_encoder_decoder", "id2label", "label2id")
_SLOTS = "transformers' BERT counts places, padding included, so a row padded left differs there from the row alone"

BERT = Family(
    name="bert",
    theirs={
        "base": "BertModel",
        "masked-lm": "BertForMaskedLM",
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "embedding": "BertModel",
    },
    ours={"embedding": "BertForEmbedding"},
    main_task="masked-lm",
    config={
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    variants=(
        Variant("tied"),
        Variant("untied", {"tie_word_embeddings": False}, thorough=True, proofs={"padding_token"}),
        Variant(
            "others",
            {"num_attention_heads": 1, "type_vocab_size": 1, "hidden_act": "gelu_new", "layer_norm_eps": 0.1},
        ),
        Variant("no_padding_token", {"pad_token_id": None, "hidden_act": "relu"}),
        Variant("chunked_mlp", {"chunk_size_feed_forward": 8}),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "hidden_size": {"hidden_size": 40},
        "intermediate_size": {"intermediate_size": 40},
        "num_hidden_layers": {"num_hidden_layers": 3},
        "num_attention_heads": {"num_attention_heads": 2},
        "hidden_act": {"hidden_act": "tanh"},
        "max_position_embeddings": {"max_position_embeddings": 48},
        "type_vocab_size": {"type_vocab_size": 3},
        "layer_norm_eps": {"layer_norm_eps": 0.5},
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={name: LLAMA.inert[name] for name in _INERT}
    | {
        "problem_type": "of the classification loss: tests/models/test_parity_pooled.py",
        "chunk_size_feed_forward": "says how transformers computes an MLP, not what: the variant chunked_mlp",
        "hidden_dropout_prob": "of training: test_dropout_is_active_in_training_only",
        "attention_probs_dropout_prob": "of training: test_dropout_is_active_in_training_only",
        "classifier_dropout": "of training: tests/models/test_parity_pooled.py",
        "initializer_range": "of new weights: test_fresh_weights_follow_initializer_range",
        "use_cache": "of decoders: an encoder keeps no cache",
        "is_decoder": "True is refused when the model is built",
        "add_cross_attention": "True is refused when the model is built",
        "bos_token_id": "of generation: an encoder writes nothing",
        "eos_token_id": "of generation: an encoder writes nothing",
    },
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    new_in_base=("pooler",),
    cancelled=("attention.self.key.bias",),
    excused={"left_padding": _SLOTS},
    refused=(
        ({"hidden_act": "snake"}, "not supported"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 must divide"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"is_decoder": True, "add_cross_attention": True}, "is not supported by BERT"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ),
)
