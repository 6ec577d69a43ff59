"""T5's entry in the table."""

from __future__ import annotations

from tests.models.table import Family, Variant

_NO_POSITIONS = "T5 takes no position_ids: its positions are distances between places"

T5 = Family(
    name="t5",
    theirs={"base": "T5Model", "seq2seq": "T5ForConditionalGeneration"},
    main_task="seq2seq",
    config={
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
        "eos_token_id": None,
    },
    variants=(
        Variant("relu"),
        Variant("gated_gelu", {"feed_forward_proj": "gated-gelu"}, proofs={"gradients", "generate", "files"}),
        Variant("gated_silu", {"feed_forward_proj": "gated-silu"}),
        Variant("gelu", {"feed_forward_proj": "gelu"}),
        Variant("unscaled", {"scale_decoder_outputs": False}, proofs={"gradients", "generate"}),
        Variant("untied_in_the_file", {"tie_word_embeddings": False}),
        Variant("deep_encoder", {"num_layers": 3, "num_decoder_layers": 1}, proofs={"generate"}),
        Variant("deep_decoder", {"num_layers": 1, "num_decoder_layers": 3}, proofs={"base"}),
        Variant("wide_heads", {"d_kv": 12, "num_heads": 3}),
        Variant("far_reach", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
        Variant(
            "few_buckets",
            {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 7},
            proofs={"padding"},
        ),
        Variant("norm_epsilon", {"layer_norm_epsilon": 0.1}),
        Variant("start_and_pad", {"decoder_start_token_id": 5, "pad_token_id": 2}, proofs={"generate"}),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "d_model": {"d_model": 40},
        "d_kv": {"d_kv": 6},
        "d_ff": {"d_ff": 40},
        "num_layers": {"num_layers": 3},
        "num_decoder_layers": {"num_decoder_layers": 1},
        "num_heads": {"num_heads": 2},
        "relative_attention_num_buckets": {"relative_attention_num_buckets": 20},
        "relative_attention_max_distance": {"relative_attention_max_distance": 30},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
        "feed_forward_proj": {"feed_forward_proj": "gated-gelu"},
        "scale_decoder_outputs": {"scale_decoder_outputs": False},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
    },
    inert={
        "transformers_version": "names the writer",
        "architectures": "names the writer's class",
        "return_dict": "outputs are always objects here",
        "dtype": "of the stored weights: chosen while loading (tests/hub)",
        "chunk_size_feed_forward": "transformers' T5 does not read it",
        "is_encoder_decoder": "of transformers' caches and generation",
        "is_decoder": "each side is told which it is, whatever the config says",
        "use_cache": "a cache is used where one is given",
        "id2label": "of classification",
        "label2id": "of classification",
        "problem_type": "of classification",
        "classifier_dropout": "of classification",
        "dropout_rate": "of training: test_dropout_is_active_in_training_only",
        "initializer_factor": "of new weights: test_fresh_weights_follow_initializer_range",
        "pad_token_id": "of shifted labels: tests/models/test_parity_seq2seq.py",
        "eos_token_id": "of generation: test_end_of_text",
    },
    excused={
        "positions": _NO_POSITIONS,
        "segments": "packed rows would need segments of the encoder, the decoder and between them",
        "gaps": "its distances count places, those of masked tokens included, as transformers' do",
    },
    dropout=("dropout_rate",),
    deviation="initializer_factor",
    factors={".q.weight": 8**-0.5},  # as T5 draws them: products are not scaled, and softmax would be a mere argmax
    refused=(
        ({"feed_forward_proj": "gated-snake"}, "not supported"),
        ({"relative_attention_num_buckets": 3}, "at least 4 buckets"),
        ({"relative_attention_max_distance": 6}, "max_distance=6"),
    ),
)
