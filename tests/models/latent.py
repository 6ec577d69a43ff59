"""The entries of DeepSeek's families and of GLM-4.5, whose experts are DeepSeek's."""

from __future__ import annotations

from typing import Any

from tests.models.llama import LLAMA, YARN, rope
from tests.models.table import SUFFIXES, Family, Variant

_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "output_hidden_states", "output_attentions", "pad_token_id",
    "attention_bias",
)  # fmt: skip
_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,  # transformers' product of experts wants rows of whole 16 bytes, in bfloat16, too
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
_FIELDS: dict[str, Any] = {field: LLAMA.fields[field] for field in _SHARED} | {
    "intermediate_size": LLAMA.fields["intermediate_size"],
    "moe_intermediate_size": {"moe_intermediate_size": 24},
    "n_routed_experts": {"n_routed_experts": 12},
    "num_experts_per_tok": {"num_experts_per_tok": 2},
    "n_shared_experts": {"n_shared_experts": 1},
    "first_k_dense_replace": {"first_k_dense_replace": 0},
    "n_group": {"n_group": 2},
    "topk_group": {"topk_group": 4},
    "routed_scaling_factor": {"routed_scaling_factor": 1.0},
    "output_router_logits": {"output_router_logits": True},
}
_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_LATENT_FIELDS = {
    "num_attention_heads": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "q_lora_rank": {"q_lora_rank": None},
    "kv_lora_rank": {"kv_lora_rank": 8},
    "qk_nope_head_dim": {"qk_nope_head_dim": 8},
    "qk_rope_head_dim": {"qk_rope_head_dim": 6},
    "v_head_dim": {"v_head_dim": 12},
}
_MSCALES = rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3)
_INERT = dict(LLAMA.inert)
_LATENT_INERT = {"num_key_value_heads": "every head has its keys and values: another number is refused"}
_OF_GENERATION = {"num_mtp_layers": "of modules that predict further tokens, which only `use_mtp` of generate asks for"}
_FEW = ({"num_experts_per_tok": 5}, "5 experts of 2 among 4 groups")


def entry(
    name: str,
    prefix: str,
    tasks: tuple[str, ...],
    config: dict[str, Any],
    variants: tuple[Variant, ...],
    fields: dict[str, Any],
    inert: dict[str, str],
    refused: tuple[Any, ...],
    **options: Any,
) -> Family:
    """Make an entry: Llama's tiny config with experts like DeepSeek's, and what is the family's own."""
    theirs = {task: prefix + SUFFIXES[task] for task in tasks}
    every, config = _FIELDS | fields, LLAMA.config | _ROUTED | config
    return Family(name, theirs, config, variants, every, _INERT | inert, refused=refused, **options)


_TASKS = tuple(SUFFIXES)
_OTHER_HEADS = ({"num_key_value_heads": 2}, "num_key_value_heads=2")
_NO_FACTOR = (rope("yarn", **YARN | {"factor": None}, mscale_all_dim=1.3), "need a 'factor'")
_HALVES = {"rope_interleave": False, "q_lora_rank": None, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}
_PLAIN = {"tie_word_embeddings": True, "attention_bias": True, "output_router_logits": True}

_DEEPSEEK_V3 = entry(
    "deepseek_v3",
    "DeepseekV3",
    _TASKS[:4],
    _LATENT,
    (Variant("latent"), Variant("halves_yarn", _HALVES | _PLAIN | _MSCALES, proofs={"gradients", "generate"})),
    _LATENT_FIELDS | {"norm_topk_prob": {"norm_topk_prob": False}, "rope_interleave": {"rope_interleave": False}},
    _LATENT_INERT | _OF_GENERATION,
    (*LLAMA.refused[:2], _OTHER_HEADS, _NO_FACTOR, _FEW, ({"n_group": None}, "must be numbers")),
)

_DEEPSEEK_V2 = entry(
    "deepseek_v2",
    "DeepseekV2",
    _TASKS[:3],
    _LATENT | {"topk_method": "group_limited_greedy"},
    (
        Variant("latent"),
        Variant(
            "greedy_yarn",
            {"topk_method": "greedy", "n_group": None, "q_lora_rank": None, "mlp_bias": True} | _PLAIN | _MSCALES,
            proofs={"gradients", "generate"},
        ),
    ),
    _LATENT_FIELDS | {"topk_method": {"topk_method": "greedy"}, "mlp_bias": {"mlp_bias": True}},
    _LATENT_INERT
    | {
        "head_dim": "transformers overwrites it with qk_rope_head_dim",
        "norm_topk_prob": "transformers' DeepSeek-V2 does not read it",
    },
    (
        *LLAMA.refused[:2],
        _OTHER_HEADS,
        _NO_FACTOR,
        _FEW,
        ({"topk_method": "noaux_tc"}, "noaux_tc"),
        ({"n_group": None}, "needs n_group"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
    ),
)

_PARTIAL = {"partial_rotary_factor": 0.5}

_GLM4_MOE = entry(
    "glm4_moe",
    "Glm4Moe",
    _TASKS[:2],
    {"head_dim": 8, "use_qk_norm": True} | rope("default", **_PARTIAL),
    (
        Variant("gqa"),
        Variant(
            "one_group_yarn",
            {"use_qk_norm": False, "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
            | _PLAIN
            | rope("yarn", **YARN, **_PARTIAL),
            proofs={"gradients"},
        ),
    ),
    {
        **{name: LLAMA.fields[name] for name in ("num_attention_heads", "num_key_value_heads")},
        # A missing factor is filled in; given, it is found again.
        "rope_parameters": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 1.0}
        },
        "max_position_embeddings": {"max_position_embeddings": 32} | rope("dynamic", factor=4.0, **_PARTIAL),
        "head_dim": {"head_dim": 12},
        "use_qk_norm": {"use_qk_norm": False},
        "norm_topk_prob": {"norm_topk_prob": False},
    },
    _OF_GENERATION,
    (*LLAMA.refused, _FEW),
)

LATENT = (_DEEPSEEK_V3, _DEEPSEEK_V2, _GLM4_MOE)
