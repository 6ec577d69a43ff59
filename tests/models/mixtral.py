"""Mixtral's entry in the table; its balancing loss and its forms of checkpoint are in `test_mixtral.py`."""

from __future__ import annotations

from tests.models.dense import RUNNING
from tests.models.llama import LLAMA, YARN, rope
from tests.models.table import Family, Variant

_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "head_dim", "output_hidden_states", "output_attentions", "pad_token_id",
)  # fmt: skip
_WINDOW_WITH_GAPS = {"gaps": "its window counts places, those of masked tokens included, as transformers' does"}
_HEAD_DIM = {"head_dim": 8}  # as without it, but transformers' scaled ropes fail if it is left to be inferred
_INERT = {name: reason for name, reason in LLAMA.inert.items() if name != "pretraining_tp"}

MIXTRAL = Family(
    name="mixtral",
    theirs={
        "base": "MixtralModel",
        "causal-lm": "MixtralForCausalLM",
        "sequence-classification": "MixtralForSequenceClassification",
    },
    config={**LLAMA.config, "num_local_experts": 4, "num_experts_per_tok": 2},
    variants=(
        Variant("gqa"),
        Variant(
            "window",
            {"sliding_window": 6, "head_dim": 12, "pad_token_id": 0},
            thorough=True,
            excused=_WINDOW_WITH_GAPS,
        ),
        Variant("tied", {"tie_word_embeddings": True, "num_key_value_heads": 4}, proofs={"gradients", "files"}),
        Variant("one_expert_each", {"num_experts_per_tok": 1}, proofs={"gradients", "padding", "generate"}),
        Variant("all_experts", {"num_experts_per_tok": 4}, proofs={"gradients"}),
        Variant("many_experts", {"num_local_experts": 24, "num_experts_per_tok": 3}, proofs={"sharding"}),
        Variant("router_logits", {"output_router_logits": True}, proofs={"padding"}),
        Variant("window_3", {"sliding_window": 3}, proofs=RUNNING),
        Variant("gelu_yarn", _HEAD_DIM | {"hidden_act": "gelu"} | rope("yarn", **YARN)),
    ),
    fields={name: LLAMA.fields[name] for name in _COMMON}
    | {
        "max_position_embeddings": LLAMA.fields["max_position_embeddings"] | _HEAD_DIM,
        "sliding_window": {"sliding_window": 3},
        "num_local_experts": {"num_local_experts": 3},
        "num_experts_per_tok": {"num_experts_per_tok": 3},
        "output_router_logits": {"output_router_logits": True},
    },
    inert=_INERT
    | {
        "router_aux_loss_coef": "of the loss: test_balancing_loss",
        "router_jitter_noise": "of training: test_jitter_is_for_training",
    },
    refused=(*LLAMA.refused, ({"num_experts_per_tok": 5}, "5 of 4 experts")),
)
