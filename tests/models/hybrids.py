"""The entries of decoders in which recurrent layers stand beside or between attention layers."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, rope
from tests.models.table import SUFFIXES, Family, Variant

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "attention_bias", "output_hidden_states", "output_attentions", "pad_token_id",
)  # fmt: skip
_INERT = {
    name: reason.replace("transformers' Llama", "transformers' model")
    for name, reason in LLAMA.inert.items()
    if name != "pretraining_tp"
}
_STEPS = {
    "mamba_chunk_size": "changes the cost only: tests/layers/test_ssd.py",
    "num_logits_to_keep": "of generation: the last token's logits are all that is computed here",
}
# Where a missing factor is filled in, it must be given to be found again.
_PARTIAL = {
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 1.0}},
    "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
}
_MIXER = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_chunk_size": 8,
}
_MIXER_FIELDS = {
    "mamba_n_heads": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba_d_head": {"mamba_n_heads": 16, "mamba_d_head": 4},
    "mamba_n_groups": {"mamba_n_groups": 4},
    "mamba_d_state": {"mamba_d_state": 6},
    "mamba_d_conv": {"mamba_d_conv": 3},
    "mamba_conv_bias": {"mamba_conv_bias": False},
    "mamba_proj_bias": {"mamba_proj_bias": True},
    "time_step_limit": {"time_step_limit": (0.1, 0.3)},
    "mlp_bias": {"mlp_bias": True},
}
_BIASES = {"mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True}
_GROUPS = ({"mamba_n_groups": 3}, "n_groups=3 must divide num_heads")


def entry(
    name: str,
    prefix: str,
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    inert: dict[str, str],
    *,
    tasks: tuple[str, ...] = tuple(SUFFIXES)[:2],
    refused: tuple[Any, ...] = (),
    **options: Any,
) -> Family:
    """Make an entry: Llama's tiny config and fields, and what is the family's own."""
    return Family(
        name,
        {task: prefix + SUFFIXES[task] for task in tasks},
        {**LLAMA.config, "pad_token_id": None, **config},
        variants,
        {field: LLAMA.fields[field] for field in _SHARED} | fields,
        _INERT | inert,
        refused=(*LLAMA.refused, *refused),
        **options,
    )


_BAMBA = entry(
    "bamba",
    "Bamba",
    # Rounding decides nothing here: at half the width, gradients of three layers on eight devices err by 3e-5.
    {**_MIXER, "hidden_size": 64, "mamba_n_heads": 16, "attn_layer_indices": [0], "rms_norm_eps": 1e-2},
    (
        Variant("attention_first"),
        Variant(
            "biased_tied",
            {**_BIASES, "attn_layer_indices": [1], "mamba_n_groups": 1, "tie_word_embeddings": True},
            proofs={"gradients", "padding"},
        ),
    ),
    {
        **_MIXER_FIELDS,
        **_PARTIAL,
        "hidden_size": {"hidden_size": 48, "mamba_n_heads": 12},
        "mamba_n_heads": {"mamba_n_heads": 8, "mamba_d_head": 16},
        "mamba_d_head": {"mamba_n_heads": 32, "mamba_d_head": 4},
        "mamba_expand": {"mamba_expand": 3, "mamba_n_heads": 24},
        "attn_layer_indices": {"attn_layer_indices": [1]},
    },
    {**_STEPS, "z_loss_coefficient": "of the loss, and another than 0 is refused"},
    refused=(_GROUPS, ({"z_loss_coefficient": 0.1}, "LossConfig")),
)

_FACTORS: dict[str, Any] = {
    "lm_head_multiplier": 0.7,
    "embedding_multiplier": 1.3,
    "mlp_multipliers": [0.8, 1.2],
    "key_multiplier": 0.6,
    "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.4,
    "ssm_multipliers": [0.7, 1.1, 0.8, 1.2, 0.9],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.85,
}

_FALCON_H1 = entry(
    "falcon_h1",
    "FalconH1",
    {**_MIXER, **_FACTORS, "mamba_d_ssm": 64},
    (
        Variant("gated"),
        Variant(
            "normed_biased_tied",
            {**_BIASES, "projectors_bias": True, "mamba_rms_norm": True, "tie_word_embeddings": True}
            | dict.fromkeys(("mamba_d_ssm", "mlp_multipliers", "ssm_multipliers"), None),
            proofs={"gradients", "padding"},
        ),
    ),
    {
        **_MIXER_FIELDS,
        "mamba_d_ssm": {"mamba_d_ssm": 48, "mamba_n_heads": 6},
        "mamba_expand": {"mamba_d_ssm": None, "mamba_expand": 3, "mamba_n_heads": 12},
        "mamba_rms_norm": {"mamba_rms_norm": True},
        "mamba_norm_before_gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
        "projectors_bias": {"projectors_bias": True},
        **{name: {name: [1.0] * len(f) if isinstance(f, list) else 1.0} for name, f in _FACTORS.items()},
    },
    _STEPS,
    refused=(_GROUPS,),
)

_QWEN3_NEXT = entry(
    "qwen3_next",
    "Qwen3Next",
    {
        **rope("default", partial_rotary_factor=0.5),
        # With headers of this length torch adds up the shared expert's gate from a file as from memory, bit for bit.
        "vocab_size": 104,
        "full_attention_interval": 2,
        "head_dim": 8,
        # What is divided by its length would else be next to nothing for some tokens, and rounding all of it.
        "rms_norm_eps": 1e-2,
        "linear_key_head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    (
        Variant("gated", excused={"fresh": "its heads are few for statistics: see many_heads"}),
        Variant(
            "many_heads",
            {
                "attention_bias": True,
                "decoder_sparse_step": 2,
                "hidden_size": 256,
                "linear_conv_kernel_dim": 3,
                "linear_num_value_heads": 1024,
                "linear_value_head_dim": 1,
                "norm_topk_prob": False,
                "output_router_logits": True,
                "tie_word_embeddings": True,
            },
            proofs={"fresh"},
        ),
    ),
    {
        **_PARTIAL,
        "vocab_size": {"vocab_size": 112},
        "head_dim": {"head_dim": 12},
        "intermediate_size": {"intermediate_size": 40, "mlp_only_layers": [1]},
        "layer_types": {"layer_types": ["full_attention", "linear_attention"]},
        "linear_conv_kernel_dim": {"linear_conv_kernel_dim": 3},
        "linear_key_head_dim": {"linear_key_head_dim": 12},
        "linear_value_head_dim": {"linear_value_head_dim": 8},
        "linear_num_key_heads": {"linear_num_key_heads": 4},
        "linear_num_value_heads": {"linear_num_value_heads": 6},
        "decoder_sparse_step": {"decoder_sparse_step": 2},
        "mlp_only_layers": {"mlp_only_layers": [0]},
        "moe_intermediate_size": {"moe_intermediate_size": 40},
        "shared_expert_intermediate_size": {"shared_expert_intermediate_size": 24},
        "num_experts": {"num_experts": 3},
        "num_experts_per_tok": {"num_experts_per_tok": 3},
        "norm_topk_prob": {"norm_topk_prob": False},
        "output_router_logits": {"output_router_logits": True},
    },
    {"router_aux_loss_coef": "of the loss: test_balancing_loss"},
    tasks=tuple(SUFFIXES),
    refused=(
        ({"num_experts_per_tok": 5}, "5 of 4 experts"),
        ({"linear_num_key_heads": 3}, "linear_num_key_heads=3"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ),
    reads_padding={
        "question-answering": "start and end are looked for in padding, too, whose positions transformers counts on"
    },
)

HYBRIDS = (_BAMBA, _FALCON_H1, _QWEN3_NEXT)
