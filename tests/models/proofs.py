"""What is proved of every family, in words; each proof is one test that asks the table for its cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_WRITES = ("causal-lm", "seq2seq")


@dataclass(frozen=True)
class Proof:
    """A proof.

    Attributes:
        claim: what holds if it passes.
        on: which variants of a family it is run in: every one, the thorough ones or the main one. A variant can ask
            for more, and the main one is always thorough.
        tasks: a family must offer one of them for the proof to make sense; none: any family.
        of_others: whether it is of the tasks beside the main one.
    """

    claim: str
    on: Literal["every", "thorough", "main"]
    tasks: tuple[str, ...] = ()
    of_others: bool = False


PROOFS = {
    "outputs": Proof("logits and hidden states are those of transformers", "every"),
    "attentions": Proof("attention weights are those of transformers", "every"),
    "to_torch": Proof("`to_torch` gives what transformers' class loads strictly, bit for bit", "every"),
    "padding": Proof("a row padded left or right gives what the row alone gives", "thorough"),
    "base": Proof("the model without a head loads the same checkpoint", "thorough", ("base",)),
    "positions": Proof("`position_ids` have the effect they have in transformers", "thorough"),
    "embeds": Proof("`inputs_embeds` stand for their tokens", "thorough"),
    "segments": Proof("sequences packed in one row with `segment_ids` give what each alone gives", "thorough"),
    "gradients": Proof("the loss and the gradient of every parameter are those of transformers", "thorough"),
    "cache": Proof("a run in parts with a cache gives what one run gives", "thorough", _WRITES),
    "generate": Proof("32 greedy tokens are those of transformers, padded prompts included", "thorough", _WRITES),
    "files": Proof("saved files load here and in transformers, in one piece or in shards, bit for bit", "thorough"),
    "bfloat16": Proof("bfloat16 weights go through files unchanged and compute what transformers computes", "main"),
    "sharding": Proof("outputs, loss and gradients on eight devices are those of one", "main"),
    "nf4": Proof(
        "quantized by `nf4`, it saves and reloads with the same logits bit for bit, on eight devices, too", "main"
    ),
    "8bit": Proof(
        "quantized by `8bit`, it saves and reloads with the same logits bit for bit, on eight devices, too", "main"
    ),
    "a8bit": Proof(
        "quantized by `a8bit`, it saves and reloads with the same logits bit for bit, on eight devices, too", "main"
    ),
    "a8q": Proof(
        "quantized by `a8q`, it saves and reloads with the same logits bit for bit, on eight devices, too", "main"
    ),
    "a4q": Proof(
        "quantized by `a4q`, it saves and reloads with the same logits bit for bit, on eight devices, too", "main"
    ),
    "quantized_sharding": Proof("quantized by `nf4`, outputs on eight devices are those of one", "main"),
    "tasks": Proof("the classes of the other tasks give transformers' outputs and loss", "main", of_others=True),
    "left_padding": Proof(
        "in the other tasks, too, rows padded left give what transformers gives", "main", of_others=True
    ),
    "fields": Proof("every changed field of the config has the effect it has in transformers", "main"),
    "refused": Proof("values that are not supported are refused when a model is built", "main"),
    "fresh": Proof("new weights are distributed as transformers draws them", "main"),
    "padding_token": Proof("the padding token's embedding is trained exactly where transformers trains it", "main"),
    "mechanisms": Proof("the attention mechanisms agree", "main"),
    "sdpa": Proof("JAX's own attention agrees with ours", "main"),
    "remat": Proof("gradient checkpointing changes no gradient", "main"),
    "scan": Proof("layers under a scan compute what layers one by one compute, from the same files", "main"),
    "scan_cache": Proof("layers under a scan keep and generate what layers one by one do", "main", _WRITES),
    "dropout": Proof("dropout is active in training only, and drawn from the keys given", "main"),
    "lora_identity": Proof("adapters that are not trained yet change no bit of the logits", "main"),
    "lora_merged": Proof("adapters folded into the weights compute what they compute apart", "main"),
    "lora_sharding": Proof("adapters on eight devices compute what they compute on one", "main"),
    "mask_width": Proof("a cached run takes a mask of the whole sequence so far", "main", _WRITES),
    "gaps": Proof("masked tokens in the middle of a cached run leave the others as they are", "main", _WRITES),
    "end_of_text": Proof("rows end at the tokens transformers ends them at", "main", _WRITES),
    "right_padding": Proof("prompts padded right are continued as those padded left", "main", _WRITES),
}

# How docs/families.md arranges them.
SECTIONS = {
    "Forward pass": (
        "outputs", "attentions", "padding", "base", "positions", "embeds", "segments", "tasks", "left_padding",
    ),
    "Training": ("gradients", "padding_token", "remat", "dropout", "fresh"),
    "Caches and generation": ("cache", "mask_width", "gaps", "generate", "end_of_text", "right_padding"),
    "Layers under a scan": ("scan", "scan_cache"),
    "Adapters": ("lora_identity", "lora_merged", "lora_sharding"),
    "Weights and devices": ("to_torch", "files", "bfloat16", "sharding"),
    "Quantization": ("nf4", "8bit", "a8bit", "a8q", "a4q", "quantized_sharding"),
    "Config and options": ("fields", "refused", "mechanisms", "sdpa"),
}  # fmt: skip
