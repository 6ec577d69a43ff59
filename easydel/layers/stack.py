"""The layers of a model, and the one loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx

from easydel.layers.attention.bias import AttentionBias
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.ring import KEPT
from easydel.rngs import are_for_shapes
from easydel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What every layer of a forward pass is given besides the hidden states.

    Attributes:
        rotary: cosines and sines `[batch, seq, dim]`, or `None`; by the kind of layer where kinds differ in them
            (`RotaryByKind`), for a block to take its own from.
        mask: who may attend to whom; its `offset` is the slot of the first new token, `None` if that is 0.
        tokens: bool `[batch, seq]`, which of the new places hold a token (the rest is padding); `None`: all. For layers
            that carry a state along.
        bias: what is added to the products of self-attention, or `None`.
        encoded: an encoder's states, `[batch, source, hidden]`, for layers that attend to them.
        encoded_valid: bool `[batch, source]`, which of them hold a token; `None`: all.
        output_attentions: whether layers return their attention weights (static).
        output_hidden_states: whether what each layer is given will be asked for (static).
    """

    rotary: Any
    mask: AttentionMask
    tokens: jax.Array | None = None
    bias: AttentionBias | None = None
    encoded: jax.Array | None = None
    encoded_valid: jax.Array | None = None
    output_attentions: bool = field(default=False, metadata={"static": True})
    output_hidden_states: bool = field(default=False, metadata={"static": True})

    def replace(self, **changes: Any) -> LayerInputs:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerOutput:
    """What a layer gives back.

    Attributes:
        hidden: `[batch, seq, hidden]`.
        cache: the updated cache of the layer, if there was one.
        attention: the attention weights `[batch, heads, queries, keys]`, if asked for.
        cross_attention: likewise, of the attention to an encoder.
        router_logits: of a layer with experts, `[batch, seq, experts]`.
    """

    hidden: jax.Array
    cache: Any = None
    attention: jax.Array | None = None
    cross_attention: jax.Array | None = None
    router_logits: jax.Array | None = None

    def replace(self, **changes: Any) -> LayerOutput:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class StackOutput:
    """What a stack gives back.

    Attributes:
        hidden: `[batch, seq, hidden]`, of the last layer.
        inputs: what each layer was given, `[batch, seq, hidden]`; layers in a scan tell it only if it is asked for.
        layers: what each layer gave back; its hidden states and cache are not meant to be read here.
        caches: the updated caches, of the kind that were given.
    """

    hidden: jax.Array
    inputs: tuple[jax.Array, ...]
    layers: tuple[LayerOutput, ...]
    caches: Any = ()

    def replace(self, **changes: Any) -> StackOutput:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def collect(self, name: str) -> tuple[Any, ...]:
        """Return a field of all layers' outputs, of those that have it."""
        return tuple(value for layer in self.layers if (value := getattr(layer, name)) is not None)


class LayerStack(nnx.List):
    """Blocks at `0 … N-1`, each `block(hidden, inputs, cache) -> LayerOutput`.

    Blocks know nothing of their place, so equal ones can be stored stacked and run by a scan without any other
    code knowing.
    """

    @classmethod
    def build(cls, make: Callable[[Any], nnx.Module], kinds: Sequence[Any], rngs: nnx.Rngs) -> LayerStack:
        """Make one block per kind; where only shapes are wanted, blocks of a kind are copies of its first.

        Args:
            make: kind → block.
            kinds: of each layer; blocks of equal kinds differ in their numbers only.
            rngs: the keys that `make` uses.
        """
        if not are_for_shapes(rngs):
            return cls([make(kind) for kind in kinds])
        first = {kind: nnx.split(make(kind)) for kind in dict.fromkeys(kinds)}
        return cls([nnx.merge(*first[kind], copy=True) for kind in kinds])

    def run(self, hidden: jax.Array, inputs: LayerInputs, caches: Any, remat: str = "none") -> StackOutput:
        """Run all blocks.

        Args:
            hidden: `[batch, seq, hidden]`.
            inputs: shared by all blocks.
            caches: one per block, or `None`.
            remat: what a block keeps for its backward pass (`config.gradient_checkpointing`).
        """
        hidden = constrain(hidden, "batch", "sequence", None)
        states, outputs = [], []
        for position, block in enumerate(self):
            states.append(hidden)
            out = _run_block(block, hidden, inputs, None if caches is None else caches[position], remat)
            hidden = constrain(out.hidden, "batch", "sequence", None)
            outputs.append(out)
        kept = tuple(out.cache for out in outputs if out.cache is not None)
        return StackOutput(hidden, tuple(states), tuple(outputs), kept)


def _run_block(block: Any, hidden: jax.Array, inputs: LayerInputs, cache: Any, remat: str) -> LayerOutput:
    if remat == "none":
        return block(hidden, inputs, cache)
    return nnx.remat(lambda b, *args: b(*args), policy=remat_policy(remat))(block, hidden, inputs, cache)


def remat_policy(remat: str) -> Any:
    """Return `jax.checkpoint`'s policy for a `gradient_checkpointing` other than `"none"`."""
    policies = jax.checkpoint_policies
    return {
        "full": None,
        # What a ring gives are results of products as well; nothing goes round again for them.
        "dots": policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(KEPT)),
        "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
    }[remat]
