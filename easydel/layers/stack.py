"""The layers of a model, and the one loop over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from easydel.layers.attention.mask import AttentionMask
from easydel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What every layer of a forward pass is given besides the hidden states.

    Attributes:
        rotary: cosines and sines `[batch, seq, dim]`, or `None`.
        mask: who may attend to whom.
        index: int32 `[]`, the first slot of the caches to write; `None` without caches.
        output_attentions: whether layers return their attention weights (static).
    """

    rotary: tuple[jax.Array, jax.Array] | None
    mask: AttentionMask
    index: jax.Array | None = None
    output_attentions: bool = field(default=False, metadata={"static": True})


@dataclass(frozen=True)
class StackOutputs:
    """What a stack gives back; `hidden_states` holds the input of each layer."""

    hidden: jax.Array
    caches: tuple[Any, ...] | None
    hidden_states: tuple[jax.Array, ...]
    attentions: tuple[jax.Array, ...]


class LayerStack(nnx.List):
    """Blocks at `0 … N-1`, each `block(hidden, inputs, cache) -> (hidden, cache, attention weights or None)`.

    Blocks know nothing of their place, so equal ones can be stored stacked and run by a scan without any other
    code knowing.
    """

    def run(
        self, hidden: jax.Array, inputs: LayerInputs, caches: tuple[Any, ...] | None, remat: str = "none"
    ) -> StackOutputs:
        """Run all blocks.

        Args:
            hidden: `[batch, seq, hidden]`.
            inputs: shared by all blocks.
            caches: one per block, or `None`.
            remat: what a block keeps for its backward pass (`config.gradient_checkpointing`).
        """
        hidden = constrain(hidden, "batch", "sequence", None)
        new_caches, states, attentions = [], [], []
        for position, block in enumerate(self):
            states.append(hidden)
            cache = None if caches is None else caches[position]
            hidden, cache, weights = _run_block(block, hidden, inputs, cache, remat)
            hidden = constrain(hidden, "batch", "sequence", None)
            new_caches.append(cache)
            attentions.append(weights)
        return StackOutputs(hidden, None if caches is None else tuple(new_caches), tuple(states), tuple(attentions))


def _run_block(block: Any, hidden: jax.Array, inputs: LayerInputs, cache: Any, remat: str) -> Any:
    if remat == "none":
        return block(hidden, inputs, cache)
    policy = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_saveable,
        "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[remat]
    return nnx.remat(lambda b, *args: b(*args), policy=policy)(block, hidden, inputs, cache)
