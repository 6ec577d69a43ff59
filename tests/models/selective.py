"""The entries of the families with Mamba's selective state-space layers."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA
from tests.models.mamba2 import MAMBA2
from tests.models.mixtral import MIXTRAL
from tests.models.table import SUFFIXES, Family, Variant

_COMMON = (
    "vocab_size", "num_hidden_layers", "layer_norm_epsilon", "conv_kernel", "use_bias", "use_conv_bias", "hidden_act",
    "output_hidden_states", "output_attentions", "pad_token_id",
)  # fmt: skip
_FRESH = "of new weights: the variant biased"
_OF_NEW_WEIGHTS = (
    "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor", "time_step_scale",
    "time_step_init_scheme",
)  # fmt: skip
_IMPLEMENTATIONS = dict.fromkeys(("use_mambapy", "use_associative_scan"), "chooses among implementations")
_NOT_INERT = (*_OF_NEW_WEIGHTS, "chunk_size", "time_step_rank")
_DRAWN = {
    "time_step_init_scheme": "constant",
    "time_step_scale": 2.0,
    "time_step_min": 0.02,
    "time_step_max": 2.0,
    "time_step_floor": 0.1,
    "rescale_prenorm_residual": True,
}
_WITHOUT_POSITIONS = {"positions": "it knows no positions: test_positions_have_no_effect"}


def entry(name: str, prefix: str, config: dict[str, Any], fields: dict[str, Any], **options: Any) -> Family:
    """Make an entry of a family of selective layers alone."""
    own = {name: reason.replace("Mamba 2", prefix) for name, reason in MAMBA2.inert.items() if name not in _NOT_INERT}
    return Family(
        name=name,
        theirs={task: f"{prefix}{SUFFIXES[task]}" for task in ("base", "causal-lm")},
        config={
            "vocab_size": 96,
            "hidden_size": 32,
            "expand": 2,
            "state_size": 8,
            "time_step_rank": 8,
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": None,
            **config,
        },
        fields={field: MAMBA2.fields[field] for field in _COMMON}
        | {
            "hidden_size": {"hidden_size": 40},
            "expand": {"expand": 3},
            "state_size": {"state_size": 4},
            "time_step_rank": {"time_step_rank": 5},
            "tie_word_embeddings": {"tie_word_embeddings": True},
        }
        | fields,
        inert={**own, **_IMPLEMENTATIONS, **dict.fromkeys(_OF_NEW_WEIGHTS, _FRESH)},
        excused={name: reason for name, reason in MAMBA2.excused.items() if name != "positions"} | _WITHOUT_POSITIONS,
        refused=(
            ({"hidden_act": "snake"}, "not supported"),
            ({"time_step_init_scheme": "zeros"}, "time_step_init_scheme='zeros'"),
        ),
        **options,
    )


_BIASED = {
    "use_bias": True,
    "use_conv_bias": False,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "conv_kernel": 3,
    "time_step_rank": "auto",
}

_MAMBA = entry(
    "mamba",
    "Mamba",
    {},
    {},
    variants=(
        Variant("silu", lengths=(1, 24)),
        Variant("biased", _BIASED | _DRAWN, proofs={"gradients", "fresh"}),
    ),
)

_FALCON_MAMBA = entry(
    "falcon_mamba",
    "FalconMamba",
    {"mixer_rms_eps": 0.1},  # a norm of few small numbers makes much of rounding
    {"mixer_rms_eps": {"mixer_rms_eps": 2.0}},
    variants=(
        Variant("silu"),
        Variant("biased", _BIASED | _DRAWN, proofs={"gradients", "fresh"}),
    ),
)

_JAMBA_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "output_hidden_states",
    "output_attentions", "output_router_logits", "pad_token_id", "num_experts_per_tok",
)  # fmt: skip
_FOUR_LAYERS = {"num_hidden_layers": 4}

_JAMBA = Family(
    name="jamba",
    theirs={task: f"Jamba{SUFFIXES[task]}" for task in tuple(SUFFIXES)[:3]},
    config={
        **{name: value for name, value in LLAMA.config.items() if name != "rope_parameters"},
        "intermediate_size": 24,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "pad_token_id": None,
    },
    variants=(
        Variant("mixed"),
        Variant(
            "every_kind",  # attention and Mamba, each with and without experts
            {
                **_FOUR_LAYERS,
                "attn_layer_offset": 0,
                "expert_layer_period": 3,
                "mamba_conv_bias": False,
                "mamba_proj_bias": True,
                "mamba_dt_rank": "auto",
                "tie_word_embeddings": True,
            },
            proofs={"gradients"},
        ),
    ),
    fields={field: MIXTRAL.fields[field] for field in _JAMBA_COMMON}
    | {
        "num_experts": {"num_experts": 3},
        "attn_layer_period": {"attn_layer_period": 1, "attn_layer_offset": 0},
        "attn_layer_offset": {"attn_layer_offset": 0},
        "expert_layer_period": {"expert_layer_period": 1, "expert_layer_offset": 0},
        "expert_layer_offset": {"expert_layer_offset": 0},
        "mamba_d_state": {"mamba_d_state": 4},
        "mamba_d_conv": {"mamba_d_conv": 3},
        "mamba_expand": {"mamba_expand": 3},
        "mamba_dt_rank": {"mamba_dt_rank": 5},
        "mamba_conv_bias": {"mamba_conv_bias": False},
        "mamba_proj_bias": {"mamba_proj_bias": True},
    },
    inert={
        **{
            name: reason.replace("Llama", "Jamba")
            for name, reason in MIXTRAL.inert.items()
            if name != "router_jitter_noise"
        },
        **_IMPLEMENTATIONS,
        "use_mamba_kernels": "chooses among implementations",
        "max_position_embeddings": "it knows no positions",
    },
    excused=_WITHOUT_POSITIONS,
    refused=(
        ({"hidden_act": "snake"}, "not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_experts_per_tok": 5}, "5 of 4 experts"),
    ),
)

SELECTIVES = (_MAMBA, _FALCON_MAMBA, _JAMBA)
