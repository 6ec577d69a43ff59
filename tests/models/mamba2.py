"""Mamba 2's entry in the table."""

from __future__ import annotations

from tests.models.llama import LLAMA
from tests.models.table import Family, Variant

_WITHOUT_ATTENTION = "it has no attention"
_MANY_HEADS = {"hidden_size": 16, "expand": 64, "num_heads": 1024, "head_dim": 1, "n_groups": 2}
_OTHER_STEPS = {"time_step_min": 0.02, "time_step_max": 2.0, "time_step_floor": 0.1}
_GENERATES = {"generate"}
# A batch padded left: with a bias, transformers' projections of padding are not zero and enter its convolution.
_BIASED = {"generate": "transformers' padded tokens are not those of the row alone: test_bias_with_padding stands in"}

_NEVER_READ = (
    "transformers_version", "architectures", "return_dict", "dtype", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "use_cache", "bos_token_id", "eos_token_id", "initializer_range",
)  # fmt: skip
_AS_LLAMA = {name: LLAMA.inert[name].replace("Llama", "Mamba 2") for name in _NEVER_READ}

MAMBA2 = Family(
    name="mamba2",
    theirs={"base": "Mamba2Model", "causal-lm": "Mamba2ForCausalLM"},
    config={
        "vocab_size": 96,
        "hidden_size": 32,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 12,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 8,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
    },
    variants=(
        Variant("grouped", lengths=(5, 8, 24), excused={"fresh": "its heads are few for statistics: see many_heads"}),
        Variant(
            "biased",
            {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
            thorough=True,
            proofs={"sharding", "bfloat16"},
            excused=_BIASED,
        ),
        Variant("one_group_per_head", {"n_groups": 8, "conv_kernel": 3}),
        Variant("one_group", {"n_groups": 1, "hidden_act": "gelu"}, proofs=_GENERATES),
        Variant("limited_steps", {"time_step_limit": [0.5, 0.9]}, proofs={"gradients", "cache", "padding", "files"}),
        Variant("no_window", {"conv_kernel": 1}, proofs={"cache", "generate"}),
        Variant("long_window", {"conv_kernel": 7}, proofs={"cache", "generate", "gaps", "padding", "segments"}),
        Variant("expand_3", {"expand": 3, "head_dim": 12, "state_size": 5}, proofs=_GENERATES),
        Variant("one_chunk", {"chunk_size": 256}, lengths=(1, 24), proofs={"gradients", "cache"}),
        Variant("chunks_of_one", {"chunk_size": 1}, proofs={"segments"}),
        Variant("many_heads", _MANY_HEADS, proofs={"fresh"}),
        Variant("drawn_otherwise", _MANY_HEADS | _OTHER_STEPS | {"rescale_prenorm_residual": True}, proofs={"fresh"}),
    ),
    fields={
        "vocab_size": {"vocab_size": 104},
        "hidden_size": {"hidden_size": 40, "num_heads": 10},
        "num_heads": {"num_heads": 4, "head_dim": 16},
        "head_dim": {"num_heads": 16, "head_dim": 4},
        "state_size": {"state_size": 6},
        "num_hidden_layers": {"num_hidden_layers": 3},
        "layer_norm_epsilon": {"layer_norm_epsilon": 0.5},
        "expand": {"expand": 3, "num_heads": 12},
        "conv_kernel": {"conv_kernel": 3},
        "n_groups": {"n_groups": 4},
        "use_bias": {"use_bias": True},
        "use_conv_bias": {"use_conv_bias": False},
        "hidden_act": {"hidden_act": "tanh"},
        "time_step_limit": {"time_step_limit": [0.1, 0.3]},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "output_hidden_states": {"output_hidden_states": True},
        "output_attentions": {"output_attentions": True},
        "pad_token_id": {"pad_token_id": 3},
    },
    inert={
        **_AS_LLAMA,
        "chunk_size": "changes the cost only: variants and tests/layers/test_ssd.py",
        "residual_in_fp32": "of half precision only: test_residuals_in_float32",
        "rescale_prenorm_residual": "of new weights: drawn_otherwise",
        "time_step_min": "of new weights: drawn_otherwise",
        "time_step_max": "of new weights: drawn_otherwise",
        "time_step_floor": "of new weights: drawn_otherwise",
        "time_step_rank": "transformers' Mamba 2 does not use it",
    },
    excused={
        "attentions": _WITHOUT_ATTENTION,
        "mechanisms": _WITHOUT_ATTENTION,
        "sdpa": _WITHOUT_ATTENTION,
        "dropout": "it has no dropout",
        "positions": "it knows no positions: test_positions_have_no_effect",
    },
    refused=(
        ({"hidden_act": "snake"}, "not supported"),
        ({"n_groups": 3}, "n_groups=3 must divide num_heads=8"),
        ({"rms_norm": False}, "rms_norm=False"),
    ),
)
