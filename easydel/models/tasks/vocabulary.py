"""Heads that give every token of the vocabulary a logit."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.layers import Embed
from easydel.layers.linear import Linear
from easydel.loss import UncomputedLogits
from easydel.models.tasks.base import TaskModule
from easydel.outputs import CausalLMOutput, ModelOutput


class VocabularyTask(TaskModule):
    """A task whose head is a layer `[hidden, vocab]`, or the embedding if `tie_word_embeddings`.

    What a family's head does besides goes into `head_input`, `head_bias` and `logit_softcap`: from them come logits,
    and in their place, for a `LossConfig` with chunks, what a loss computes a few tokens' logits from at a time.
    """

    output_class: ClassVar[type[Any]] = CausalLMOutput
    lm_head: nnx.Module

    def head_layer(self) -> Any:
        """Return the layer that maps `head_input` to logits: the embedding, if the head is tied."""
        return self.base_model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Map the backbone's hidden states `[..., hidden]` to what the head's layer is given, of the same shape."""
        return hidden

    def head_bias(self) -> jax.Array | None:
        """Return what is added to the logits besides the layer's own bias, `[vocab]`; `None`: nothing."""
        return None

    @property
    def logit_softcap(self) -> float | None:
        """Logits `x` become `cap · tanh(x / cap)`; `None`: they stay."""
        return None

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[..., hidden]` to logits `[..., vocab]`."""
        layer, hidden = self.head_layer(), self.head_input(hidden)
        logits = layer.attend(hidden) if isinstance(layer, nnx.Embed) else layer(hidden)
        if (bias := self.head_bias()) is not None:
            logits = logits + bias.astype(self.dtype)
        cap = self.logit_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def leave_uncomputed(self, hidden: jax.Array) -> UncomputedLogits:
        """Return what stands for `compute_logits(hidden)`, of hidden states `[batch, seq, hidden]`.

        Raises:
            UnsupportedError: the class makes its logits in another way, or the head is no plain layer.
        """
        for name in ("compute_logits", "head"):
            if getattr(type(self), name) is not getattr(VocabularyTask, name):
                raise UnsupportedError(
                    f"token_chunk_size is not supported by {type(self).__name__}, which has a {name} of its own: "
                    "override head_layer, head_input, head_bias or logit_softcap in place of that, or leave "
                    "token_chunk_size out of the LossConfig"
                )
        kernel, bias, transposed = head_weights(self.head_layer())
        if (added := self.head_bias()) is not None:
            bias = added if bias is None else bias + added
        return UncomputedLogits(
            hidden=self.head_input(hidden).astype(self.dtype),
            kernel=kernel.astype(self.dtype),
            bias=None if bias is None else bias.astype(self.dtype),
            transposed=transposed,
            soft_cap=self.logit_softcap,
            precision=self.precision,
        )

    def logits_fields(self, hidden: jax.Array, loss_config: Any) -> dict[str, Any]:
        """Return the output's field with the logits, or with what stands for them, as `loss_config` says."""
        if getattr(loss_config, "token_chunk_size", None) is not None:
            return {"uncomputed_logits": self.leave_uncomputed(hidden)}
        return {"logits": self.compute_logits(hidden)}

    def run(self, inputs: dict[str, Any], loss_config: Any) -> ModelOutput:
        """Run the backbone and the head."""
        if getattr(loss_config, "token_chunk_size", None) is None:
            return super().run(inputs, loss_config)
        out: Any = self.base_model(**inputs)
        return self.output_class(**self.logits_fields(out.last_hidden_state, loss_config), **out.carried())

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> ModelOutput:
        """Turn the backbone's output into logits `[batch, seq, vocab]`."""
        return self.output_class(logits=self.compute_logits(out.last_hidden_state), **out.carried())


def head_weights(layer: Any) -> tuple[jax.Array, jax.Array | None, bool]:
    """Return a head's kernel and bias, and whether the kernel is transposed (`[vocab, hidden]`).

    Raises:
        UnsupportedError: the layer is no plain one, so that its kernel need not be what it computes with.
    """
    if type(layer) in (Embed, nnx.Embed):
        return layer.embedding.get_value(), None, True
    if type(layer) in (Linear, nnx.Linear):
        return layer.kernel.get_value(), None if layer.bias is None else layer.bias.get_value(), False
    raise UnsupportedError(
        f"token_chunk_size is not supported with a head of type {type(layer).__name__}, only with Linear and Embed: "
        "leave token_chunk_size out of the LossConfig, or keep adapters and quantization away from the head"
    )
